// What happened: loads, recoveries, moves and returns, as a strip of the last hour and as a list.

import { h } from "./dom.js";
import { count, duration, figure } from "./format.js";
import { sentence } from "./server.js";

const TIMELINE_S = 3600;
const SHOWN = 12;
const KINDS = { load: "Loaded", recovery: "Recovered", move: "Moved", return: "Returned", unload: "Unloaded" };

/** Return the section of events. */
export function timeline(state) {
  const events = state.events ?? [];
  return h(
    "section",
    { "aria-labelledby": "timeline-title" },
    h("h2", { id: "timeline-title" }, "What happened"),
    events.length
      ? [hourStrip(events), h("ol", { class: "events" }, [...events].reverse().slice(0, SHOWN).map(eventRow))]
      : h("p", { class: "soft" }, "Nothing yet."),
  );
}

function hourStrip(events) {
  const at = (age) => 1000 * (1 - Math.min(1, age / TIMELINE_S));
  const recent = events.filter((one) => one.age_seconds < TIMELINE_S);
  return h(
    "div",
    { class: "hour" },
    h(
      "svg",
      {
        viewBox: "0 0 1000 16",
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": `${count(recent.length, "event")} in the last hour`,
      },
      h("line", { x1: 0, y1: 8, x2: 1000, y2: 8 }),
      recent.map((one) => {
        const end = at(one.age_seconds);
        const begin = at(one.age_seconds + one.duration_seconds);
        return h("rect", {
          class: one.kind,
          x: Math.min(begin, end - 4),
          y: 1,
          width: Math.max(4, end - begin),
          height: 14,
          rx: 2,
        });
      }),
    ),
    h("p", { class: "small soft" }, h("span", {}, "1 h ago"), h("span", {}, "now")),
  );
}

function eventRow(one) {
  const took = one.duration_seconds
    ? ` ${one.kind === "return" ? "after" : "in"} ${figure(one.duration_seconds)} s`
    : "";
  return h(
    "li",
    { class: one.kind },
    h("span", { class: "when num soft" }, `${duration(one.age_seconds)} ago`),
    h(
      "span",
      { class: "what" },
      h("span", { class: "swatch", "aria-hidden": "true" }),
      (KINDS[one.kind] ?? one.kind) + took,
    ),
    h("span", { class: "why soft" }, sentence(one.sentence)),
  );
}

// The table of live requests, and where the time of each went.

import { h } from "./dom.js";
import { colour, count, duration, figure, milliseconds, whole } from "./format.js";

/** Return the section of live requests. */
export function requests(state) {
  const hidden = state.requests_live - state.requests.length;
  return h(
    "section",
    { "aria-labelledby": "requests-title" },
    h("h2", { id: "requests-title" }, "Live requests"),
    state.requests.length
      ? h(
          "div",
          { class: "scroll bounded", tabindex: "0", role: "region", "aria-label": "List of live requests" },
          h(
            "table",
            { class: "requests" },
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                ["Request", "Phase", "Prompt", "Answer", "Rate", "Age", "A token’s way"].map((name, i) =>
                  h("th", { scope: "col", class: i > 1 && i < 6 ? "right" : null }, name),
                ),
              ),
            ),
            h("tbody", {}, state.requests.map(requestRow)),
          ),
        )
      : h("p", { class: "soft" }, "None."),
    state.requests.length
      ? legend({ weights: "computing", kept: "waiting", sent: "on the wire" }, formerMacs(state))
      : null,
    hidden > 0 ? h("p", { class: "small soft" }, `${count(hidden, "further request")} not shown.`) : null,
  );
}

/** What the colours mean: a name for each kind of swatch, then Macs with their own colours. */
export function legend(names, macs = []) {
  return h(
    "p",
    { class: "legend small soft" },
    Object.entries(names).map(([kind, name]) => h("span", {}, h("span", { class: `swatch ${kind}` }), name)),
    macs.map((name) => h("span", {}, h("span", { class: "swatch", style: { background: colour(name) } }), name)),
  );
}

/** The Macs where time of these requests went, and which hold no layers now: the pipeline does not show their colours. */
function formerMacs({ requests, stages }) {
  const serving = new Set(stages.map((stage) => stage.worker));
  const spent = requests.flatMap((request) => request.stages.map((one) => one.worker));
  return [...new Set(spent)].filter((name) => !serving.has(name));
}

function requestRow(request) {
  const phase = { queued: "waiting", prefill: "prompt", decode: "answer" }[request.state] ?? request.state;
  const read =
    request.state === "prefill"
      ? `${whole(request.prefilled_tokens)} of ${whole(request.prompt_tokens)}`
      : whole(request.prompt_tokens);
  const cached = request.cached_tokens
    ? h("span", { class: "soft" }, ` (${whole(request.cached_tokens)} cached)`)
    : null;
  const guessed = request.guessed_tokens
    ? h("span", { class: "soft" }, ` (${whole(request.guessed_tokens)} guessed)`)
    : null;
  return h(
    "tr",
    { "data-key": request.request_id },
    h("th", { scope: "row", class: "id", title: request.request_id }, request.request_id),
    h("td", {}, phase, request.lane === null ? null : h("span", { class: "soft" }, ` lane ${request.lane}`)),
    h("td", { class: "num right", "data-name": "Prompt" }, read, cached),
    h("td", { class: "num right", "data-name": "Answer" }, whole(request.completion_tokens), guessed),
    h(
      "td",
      { class: "num right", "data-name": "Rate" },
      request.tokens_per_second ? `${figure(request.tokens_per_second)}/s` : "–",
    ),
    h("td", { class: "num right", "data-name": "Age" }, duration(request.age_seconds)),
    h("td", {}, tokenWay(request.stages ?? [])),
  );
}

/** Where the time of a request went: computing (full), waiting (light) and on the wire (grey), stage by stage. */
function tokenWay(spent) {
  const total = spent.reduce((sum, one) => sum + one.compute_ms + one.wait_ms + one.wire_ms, 0);
  if (!total) return h("span", { class: "soft" }, "–");
  const words = spent.map(
    (one) =>
      `${one.worker}: ${milliseconds(one.compute_ms)} computing, ${milliseconds(one.wait_ms)} waiting, ${milliseconds(one.wire_ms)} on the wire`,
  );
  return h(
    "div",
    { class: "way", role: "img", "aria-label": words.join("; "), title: words.join("\n") },
    spent.map((one) => {
      const own = colour(one.worker);
      return [
        h("span", { style: { "flex-grow": String(one.compute_ms / total), background: own } }),
        h("span", { class: "wait", style: { "flex-grow": String(one.wait_ms / total), "--mac": own } }),
        h("span", { class: "sent", style: { "flex-grow": String(one.wire_ms / total) } }),
      ];
    }),
  );
}

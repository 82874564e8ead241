// The list of coordinators: who leads, and who stands by to take its place.

import { h } from "./dom.js";
import { count, duration } from "./format.js";

/** Return the section; null if no other coordinator is known. */
export function coordinators({ leadership }) {
  if (!leadership) return null;
  const { leader, standbys, others, replicate } = leadership;
  return h(
    "section",
    { "aria-labelledby": "coordinators-title" },
    h("h2", { id: "coordinators-title" }, "Coordinators"),
    h(
      "ul",
      { class: "models" },
      leader ? row(leader.name, "good", leaderFacts(leadership)) : row("No one leads", "bad", "a standby takes over"),
      others.map((other) => row(other.name, "bad", "leads too: the lower term ends once the two reach each other")),
      standbys.map((standby) => row(standby.name, ...standbyFacts(standby, replicate))),
    ),
  );
}

function row(name, kind, facts) {
  return h(
    "li",
    { "data-key": name },
    h(
      "span",
      {},
      h("span", { class: `dot ${kind}`, "aria-hidden": "true" }),
      h("strong", {}, name),
      " ",
      h("span", { class: "soft" }, facts),
    ),
  );
}

const leaderFacts = ({ term, since_seconds }) =>
  term ? `leads · for ${duration(since_seconds)} · term ${term}` : "leads · without workers yet";

/** Return the kind of a standby's dot, and what is said of it. */
function standbyFacts({ away, behind, in_sync, problem, silent_seconds }, replicate) {
  if (silent_seconds) return ["bad", `lost · has not answered for ${duration(silent_seconds)}`];
  if (away) return ["bad", `does not follow · ${problem}`];
  if (in_sync && replicate === "sync") return ["good", "stands by · in sync: answers go on here if the leader is lost"];
  return ["", `stands by · ${problem || (behind ? `${count(behind, "update")} behind` : "follows")}`];
}

// The view of the cluster: notices, figures, and the pipeline of Macs.

import { confirmThen } from "./confirm.js";
import { fill, h } from "./dom.js";
import { inFields } from "./fields.js";
import {
  bandwidth,
  bytes,
  colour,
  count,
  duration,
  figure,
  groups,
  holders,
  holding,
  layers,
  milliseconds,
  percent,
  whole,
} from "./format.js";
import { HISTORY } from "./history.js";
import { coordinators } from "./leaders.js";
import { legend, requests } from "./requests.js";
import { post, sentence } from "./server.js";
import { timeline } from "./timeline.js";

const STATES = {
  idle: "No model is loaded",
  loading: "Loading",
  training: "Training",
  serving: "Serving",
  recovering: "Recovering",
  failed: "Not serving",
  unknown: "Unknown state",
};

export const stateName = (state) => STATES[state.state] ?? state.state;

/** The model that is shown, of several; "" until somebody chooses one: the first that is loaded. */
let chosen = "";
/** Why the last load or unload of one of several models was refused. */
let refusal = "";

export function showCluster(root, state, history, context) {
  const model = chosenModel(state);
  const again = () => showCluster(root, context.state, history, context);
  fill(
    root,
    title(model),
    notices(state),
    state.loading ? loadSection(state.loading) : null,
    figures(model, history),
    models(state, model.model, context, again),
    model.stages.length ? pipelineSection(model) : null,
    spares(state),
    coordinators(state),
    requests(model),
    timeline(state),
  );
}

/** The state, with what is shown of the chosen model in the place of the default one. */
function chosenModel(state) {
  const loaded = state.deployments.filter((one) => one.replicas.length);
  const one = loaded.find(({ name }) => name === chosen) ?? loaded[0];
  if (!one) return state;
  const ofDefault = one === state.deployments[0];
  const sum = (count) => one.replicas.reduce((total, replica) => total + count(replica), 0);
  const stages = one.replicas.flatMap((replica) => replica.stages);
  return {
    ...state,
    forecast: ofDefault ? state.forecast : null,
    model: one.name,
    state: one.state,
    rings: one.replicas.map((replica) => replica.stages),
    stages,
    layers: Math.max(0, ...stages.map((stage) => stage.layers[1])),
    max_context: one.max_context,
    max_sequences: ofDefault ? state.max_sequences : 0,
    requests: one.replicas.flatMap((replica) => replica.requests),
    requests_live: sum((replica) => replica.requests_live),
    queued: sum((replica) => replica.queued),
  };
}

function title(state) {
  const answers = state.max_sequences ? `${count(state.max_sequences, "answer")} of ` : "";
  const facts = [
    count(state.layers, "layer"),
    `${count(groups(state.rings?.[0] ?? state.stages).length, "stage")}${state.route === "relay" ? " through the coordinator" : ""}`,
    state.rings?.length > 1 ? count(state.rings.length, "replica") : "",
    `${answers}${whole(state.max_context)} tokens ${answers ? "at once" : "of context"}`,
  ];
  return h(
    "div",
    { class: "title" },
    h("h1", {}, state.model || stateName(state)),
    state.model ? h("p", { class: "soft" }, facts.filter(Boolean).join(" · ")) : null,
    state.state === "idle"
      ? h(
          "p",
          { class: "soft" },
          "Choose a model under ",
          h("a", { href: "#plan" }, "Plan"),
          ", or with ",
          h("code", {}, "macpipe load MODEL"),
          ".",
        )
      : null,
  );
}

/** The list of several models: each with the Macs that hold it, and with what can be done with it. */
function models(state, shown, context, again) {
  if (!state.deployments.length) return null;
  return h(
    "section",
    { "aria-labelledby": "models-title" },
    h("h2", { id: "models-title" }, "Models"),
    h(
      "ul",
      { class: "models" },
      state.deployments.map((one) => {
        const serving = one.state === "serving";
        return h(
          "li",
          { "data-key": one.name },
          h(
            "span",
            {},
            h("span", { class: `dot ${serving ? "good" : ""}`, "aria-hidden": "true" }),
            h("strong", {}, one.name),
            " ",
            h("span", { class: "soft" }, modelFacts(one)),
          ),
          h("span", { class: "gap" }),
          one.replicas.length ? showButton(one, one.name === shown, again) : null,
          context.admin ? changeButton(one, again) : null,
        );
      }),
    ),
    h("p", { role: "alert", class: "problem" }, refusal),
  );
}

function modelFacts(one) {
  const live = one.replicas.reduce((sum, replica) => sum + replica.requests_live, 0);
  return [
    one.state === "idle" ? "not loaded" : (STATES[one.state] ?? one.state).toLowerCase(),
    one.pinned ? "pinned" : "",
    one.replicas.length > 1 ? count(one.replicas.length, "replica") : "",
    one.max_context ? `${whole(one.max_context)} tokens of context` : "",
    one.replicas.length ? count(live, "live request") : "",
    one.replicas.map(({ stages }) => holders(stages)).join("; "),
    one.activity,
    one.problem,
  ]
    .filter(Boolean)
    .join(" · ");
}

function showButton(one, pressed, again) {
  const onclick = () => {
    chosen = one.name;
    again();
  };
  const label = `Show ${one.name}`;
  return h(
    "button",
    { type: "button", class: "quiet", "aria-label": label, "aria-pressed": String(pressed), onclick },
    "Show",
  );
}

/** The button that loads a model with its configured options, or unloads it. */
function changeButton(one, again) {
  const isLoaded = one.replicas.length > 0;
  const [verb, question, act] = isLoaded
    ? ["Unload", `Unload ${one.name}? Its live requests end.`, () => post("api/unload", { name: one.name })]
    : [
        "Load",
        `Load ${one.name}? Idle models leave if it needs their memory.`,
        () => post("api/load", { model: one.name }),
      ];
  const tell = (sentence) => {
    refusal = sentence;
    again();
  };
  const onclick = () => {
    tell("");
    confirmThen(document.body, question, verb, act, (error) => tell(inFields(error.message)));
  };
  const disabled = one.state === "loading";
  return h(
    "button",
    { type: "button", class: "quiet", "aria-label": `${verb} ${one.name}`, disabled, onclick },
    verb,
  );
}

function notices(state) {
  const found = [];
  if (state.repair) found.push(["bad", repairSentence("Recovering", state.repair)]);
  else if (state.problem) found.push(["bad", sentence(state.problem)]);
  if (state.activity) found.push(["note", sentence(state.activity)]);
  if (state.move) found.push(["note", repairSentence("Moving layers", state.move)]);
  for (const worker of state.workers) {
    if (worker.problem && worker.name !== state.repair?.worker) found.push(["bad", problemSentence(worker)]);
    if (!worker.reachable) continue; // what it said of itself is old
    if (worker.memory_pressure === "critical")
      found.push(["note", `${worker.name} is short of memory: end other programs on it.`]);
    if (worker.lag_seconds)
      found.push(["note", `${worker.name} is overloaded and answers up to ${figure(worker.lag_seconds)} s late.`]);
  }
  for (const warning of state.warnings) found.push(["note", sentence(warning)]);
  return found.length
    ? h(
        "ul",
        { class: "notices" },
        found.map(([kind, text]) => h("li", { class: kind }, text)),
      )
    : null;
}

function problemSentence({ name, problem }) {
  return problem.includes(name) ? sentence(problem) : `${name}: ${problem}.`;
}

function repairSentence(what, repair) {
  const expected = repair.expected_seconds ? `, ${duration(repair.expected_seconds)} expected` : "";
  return `${what}: ${repair.cause}; ${repair.doing} (for ${duration(repair.since_seconds)}${expected}).`;
}

/** The progress of a load, or why the last one failed. */
export function loadSection(loading) {
  if (loading.problem)
    return h(
      "ul",
      { class: "notices" },
      h("li", { class: "bad" }, `The load failed: ${inFields(sentence(loading.problem))}`),
    );
  const wanted = loading.workers_wanted ? ` of ${loading.workers_wanted}` : "";
  if (!loading.stages.length)
    return h("p", { class: "soft" }, `Waiting for workers: ${loading.workers_found}${wanted} found.`);
  return h(
    "section",
    { "aria-label": "Progress of the load" },
    h("h2", {}, `Loading ${loading.model}`),
    h(
      "ul",
      { class: "loads" },
      loading.stages.map((stage, i) => {
        const share = stage.total_bytes ? Math.min(1, stage.done_bytes / stage.total_bytes) : 0;
        return h(
          "li",
          {},
          h("span", {}, stage.worker),
          h("progress", { max: "1", value: String(share), "aria-label": `${stage.worker}: ${percent(share)}` }),
          h("span", { class: "soft num" }, `${bytes(stage.done_bytes)} of ${bytes(stage.total_bytes)}, ${stage.state}`),
        );
      }),
    ),
  );
}

function figures(state, history) {
  const idle = state.stages.flatMap((stage) => (stage.rank ? [] : (stage.bubble_share ?? [])));
  const none = state.stages.length ? "no work in the last 30 s" : "no stage yet";
  const prompts = state.prompt_tokens ?? 0;
  const waiting = state.queued ? `${state.queued} waiting` : "none waiting";
  return h(
    "dl",
    { class: "figures" },
    quantity("Tokens a second", figure(history.rate), sparkline(history.rates)),
    quantity("Requests", whole(state.requests_live), `${waiting} · ${whole(state.requests_finished)} done`),
    quantity(
      "Cache hits",
      prompts ? percent(state.cached_tokens / prompts) : "–",
      prompts ? `of ${whole(prompts)} prompt tokens` : "no prompt yet",
    ),
    idle.length
      ? quantity(
          "Idle",
          percent(idle.reduce((sum, share) => sum + share, 0) / idle.length),
          "of the last 30 s with work",
        )
      : quantity("Idle", "–", none),
    quantity("Recoveries", whole(state.recoveries), `up ${duration(state.uptime_seconds)}`),
    state.forecast ? quantity("Predicted", figure(state.forecast.one_user), "tokens a second for one") : null,
  );
}

/** One of the figures in a list of them. */
export function quantity(name, value, detail) {
  return h(
    "div",
    { "data-key": name },
    h("dt", {}, name),
    h("dd", { class: "num big" }, value),
    h("dd", { class: "soft small" }, detail),
  );
}

function sparkline(rates) {
  const most = Math.max(...rates, 1e-9);
  const points = rates.map(
    (rate, i) => `${(HISTORY - rates.length + i) * (100 / (HISTORY - 1))},${22 - 20 * (rate / most)}`,
  );
  const label = rates.length ? `At most ${figure(Math.max(...rates))} in the last two minutes` : "No tokens yet";
  return h(
    "svg",
    { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", role: "img", "aria-label": label },
    h("line", { x1: 0, y1: 22, x2: 100, y2: 22 }),
    points.length > 1 ? h("polyline", { points: points.join(" ") }) : null,
  );
}

function pipelineSection(state) {
  const macs = new Map(state.workers.map((worker) => [worker.name, worker]));
  const rings = state.rings ?? [state.stages];
  return h(
    "section",
    { "aria-labelledby": "pipeline-title" },
    h("h2", { id: "pipeline-title" }, rings.length > 1 ? "Pipelines" : "Pipeline"),
    rings.map((stages, ring) => [
      layerBand(stages, state.layers),
      h(
        "ol",
        { class: "pipeline", "data-key": `ring-${ring}` },
        groups(stages).map((ranks, i) => [
          i ? h("li", { class: "hop", "data-key": `hop-${i}` }, hop(ranks[0])) : null,
          ranks.map((stage, rank) => [
            rank ? h("li", { class: "beside", "data-key": `beside-${i}-${rank}` }, "shares each layer with") : null,
            h(
              "li",
              { class: "mac", "data-key": `mac-${i}-${rank}`, style: { "--mac": colour(stage.worker) } },
              mac(stage, macs.get(stage.worker)),
            ),
          ]),
        ]),
      ),
    ]),
    legend({ weights: "weights", live: "reserved caches", kept: "kept prefixes", free: "free" }),
  );
}

/** All layers as one band, each Mac with its share. */
export function layerBand(stages, total) {
  return h(
    "div",
    {
      class: "band",
      role: "img",
      "aria-label": stages.map((stage) => `${stage.worker}: layers ${holding(stage)}`).join("; "),
    },
    groups(stages).flatMap((ranks) =>
      ranks.map((stage) =>
        h(
          "span",
          {
            style: {
              "flex-grow": String((stage.layers[1] - stage.layers[0]) / ranks.length),
              background: colour(stage.worker),
            },
            title: `${stage.worker}: layers ${holding(stage)} of ${total}`,
          },
          layers(stage.layers),
        ),
      ),
    ),
  );
}

function hop(stage) {
  const measured = stage.link_round_trip_ms > 0;
  const figures = measured
    ? [milliseconds(stage.link_round_trip_ms), bandwidth(stage.link_bandwidth)]
    : ["not measured"];
  if (stage.input_route === "relay") figures.unshift("relayed");
  return [
    h("span", { class: "wire", "aria-hidden": "true" }),
    figures.map((text) => h("span", { class: "soft" }, text)),
  ];
}

function mac(stage, worker) {
  const standing = standingOf(worker);
  const held = stage.weight_bytes + stage.cache_bytes;
  const step = stage.measured_ms || stage.predicted_ms;
  const planned = stage.measured_ms ? stage.expected_ms : 0;
  return [
    h("h3", {}, h("span", { class: `dot ${standing.kind}`, "aria-hidden": "true" }), stage.worker),
    h("p", { class: "small soft" }, standing.text || (worker ? worker.chip || worker.backend : "")),
    memoryBar(stage, held),
    h(
      "dl",
      { class: "facts" },
      fact("Layers", holding(stage)),
      fact("Weights", bytes(stage.weight_bytes)),
      worker ? fact("Memory", `${bytes(worker.memory_used)} of ${bytes(worker.memory_limit)}`) : null,
      step
        ? fact(
            stage.measured_ms ? "Step" : "Step, predicted",
            milliseconds(step) + (planned ? ` (plan ${figure(planned)})` : ""),
          )
        : null,
      fact("Idle, last 30 s", percent(stage.bubble_share)),
      worker?.power_watts ? fact("Power", `${figure(worker.power_watts)} W`) : null,
    ),
  ];
}

function fact(name, value) {
  return h("div", {}, h("dt", {}, name), h("dd", { class: "num" }, value));
}

function standingOf(worker) {
  if (!worker) return { kind: "bad", text: "not seen" };
  if (worker.standing === "gone") return { kind: "bad", text: `lost ${duration(worker.silent_seconds)} ago` };
  if (worker.standing === "suspect") return { kind: "note", text: `silent for ${figure(worker.silent_seconds)} s` };
  if (!worker.reachable) return { kind: "bad", text: "unreachable" };
  return worker.draining ? { kind: "note", text: "draining" } : { kind: "good", text: "" };
}

function memoryBar(stage, held) {
  const part = (kind, size, name) =>
    h("span", { class: kind, style: { "flex-grow": String(size) }, title: `${name}: ${bytes(size)}` });
  const free = Math.max(0, stage.cache_bytes - stage.reserved_bytes - stage.prefix_bytes);
  const label = `${bytes(stage.weight_bytes)} weights, ${bytes(stage.reserved_bytes)} reserved caches, ${bytes(stage.prefix_bytes)} kept prefixes, ${bytes(free)} free`;
  return h(
    "div",
    { class: "memory", role: "img", "aria-label": held ? label : "nothing is loaded" },
    part("weights", stage.weight_bytes, "Weights"),
    part("live", stage.reserved_bytes, "Reserved caches"),
    part("kept", stage.prefix_bytes, "Kept prefixes"),
    part("free", free, "Free"),
  );
}

function spares(state) {
  const others = state.deployments.flatMap((one) => one.replicas.flatMap((replica) => replica.stages));
  const serving = new Set([...state.stages, ...others].map((stage) => stage.worker));
  const why = new Map(state.spares.map((spare) => [spare.worker, spare.why]));
  const idle = state.workers.filter((worker) => !serving.has(worker.name));
  if (!idle.length)
    return state.workers.length
      ? null
      : h(
          "p",
          { class: "soft" },
          "No worker answers. Start one on each Mac with ",
          h("code", {}, "macpipe worker"),
          ".",
        );
  return h(
    "section",
    { "aria-labelledby": "spares-title" },
    h("h2", { id: "spares-title" }, state.stages.length ? "Other Macs" : "Macs"),
    h(
      "ul",
      { class: "spares" },
      idle.map((worker) => {
        const standing = standingOf(worker);
        const facts = [
          worker.chip || worker.backend,
          worker.memory_limit ? bytes(worker.memory_limit) : "",
          standing.text,
        ];
        if (worker.name === state.draft_worker) facts.push("holds the draft model");
        else if (why.get(worker.name)) facts.push(why.get(worker.name));
        return h(
          "li",
          { "data-key": worker.name },
          h("span", { class: `dot ${standing.kind}`, "aria-hidden": "true" }),
          h("strong", {}, worker.name),
          " ",
          h("span", { class: "soft" }, facts.filter(Boolean).join(" · ")),
        );
      }),
    ),
  );
}

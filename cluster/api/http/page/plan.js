// What if: which Mac would hold which layers of a model, how fast it would be, and why. An admin can load it.

import { layerBand, loadSection, quantity } from "./cluster.js";
import { confirmThen } from "./confirm.js";
import { fill, h } from "./dom.js";
import { FIELDS, inFields } from "./fields.js";
import { bytes, colour, count, figure, groups, holding, milliseconds, whole } from "./format.js";
import { post, sentence } from "./server.js";

let parts = null;
let context = null;

/** Show the view in `root`; called again with every snapshot. */
export function showPlan(root, given) {
  context = given;
  if (!parts) parts = build(root);
  const { loading, model, deployments } = context.state;
  fill(parts.progress, loading ? loadSection(loading) : null);
  parts.unload.hidden = !model || deployments.length > 0; // of several, each has a button in the list of models
  for (const button of [parts.ask, parts.load, parts.unload]) button.disabled = !context.admin;
  fill(
    parts.right,
    context.admin ? "" : "Your key may use models, but not plan or load them. That needs a key with the scope admin.",
  );
}

function build(root) {
  const option = (value, text) => h("option", { value }, text);
  const fields = {
    model: h("input", {
      id: "plan-model",
      required: true,
      placeholder: "mlx-community/… or a folder",
      spellcheck: "false",
      autocomplete: "off",
    }),
    objective: h(
      "select",
      { id: "plan-objective" },
      option("latency", "one user’s speed"),
      option("throughput", "many users’ speed"),
    ),
    max_context: h("input", { id: "plan-context", type: "number", min: 1, placeholder: "the model’s" }),
    workers: h("input", { id: "plan-workers", type: "number", min: 1, placeholder: "the best number" }),
    layers: h("input", { id: "plan-layers", placeholder: "such as 0-29,30-79", spellcheck: "false" }),
    quantize: h(
      "select",
      { id: "plan-quantize" },
      option("0", "as published"),
      ["8", "6", "5", "4", "3", "2"].map((bits) => option(bits, `${bits} bits`)),
    ),
    kv_bits: h("select", { id: "plan-kv" }, option("0", "not quantized"), option("8", "8 bits"), option("4", "4 bits")),
    route: h(
      "select",
      { id: "plan-route" },
      option("direct", "from Mac to Mac"),
      option("relay", "through the coordinator"),
    ),
  };
  const ask = h("button", { type: "submit", class: "main" }, "What if?");
  const load = h(
    "button",
    {
      type: "button",
      onclick: () => {
        if (form.reportValidity()) askFirst(loadQuestion(), "Load", startLoad);
      },
    },
    "Load",
  );
  const unload = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: () => askFirst("Unload the model? Live requests end.", "Unload", () => post("api/unload", {})),
    },
    "Unload the model",
  );
  const message = h("p", { role: "alert", class: "problem" });
  const right = h("p", { class: "soft" });
  const progress = h("div", {});
  const result = h(
    "div",
    { class: "result", "aria-live": "polite" },
    h(
      "p",
      { class: "soft" },
      "Nothing is loaded or changed: the plan comes from the model’s headers, and from the measured Macs and links.",
    ),
  );
  const form = h(
    "form",
    { class: "options", onsubmit: onAsk },
    Object.entries(FIELDS).map(([name, text]) =>
      h("div", { class: name === "model" ? "wide" : null }, h("label", { for: fields[name].id }, text), fields[name]),
    ),
    h("div", { class: "row wide" }, ask, load, h("span", { class: "gap" }), unload),
    message,
  );
  root.replaceChildren(
    h("h1", {}, "Plan"),
    right,
    h("div", { class: "columns" }, form, h("div", {}, progress, result)),
  );

  /** The options that were chosen, as the coordinator reads them. */
  function value() {
    const number = (field) => (field.value ? Number(field.value) : null);
    return {
      model: fields.model.value.trim(),
      objective: fields.objective.value,
      route: fields.route.value,
      max_context: number(fields.max_context),
      workers: number(fields.workers),
      layers: fields.layers.value.trim() || null,
      quantize: Number(fields.quantize.value),
      kv_bits: Number(fields.kv_bits.value),
    };
  }

  async function onAsk(event) {
    event.preventDefault();
    const asked = value();
    const macs = context.state.workers.filter((worker) => worker.reachable).map((worker) => worker.name);
    if (asked.workers > macs.length) {
      fill(message, `There are only ${count(macs.length, "Mac")} now: ${macs.join(", ") || "start workers first"}.`);
      return;
    }
    fill(message, "");
    ask.disabled = true;
    try {
      fill(result, planElement(await post("api/plan", asked), context.state));
    } catch (error) {
      refuse(error);
    } finally {
      ask.disabled = !context.admin;
    }
  }

  function loadQuestion() {
    const other = context.state.deployments.length
      ? "Idle models leave if it needs their memory."
      : "The served model answers until the new one has a plan.";
    return `Load ${value().model}? ${other}`;
  }

  function startLoad() {
    return post("api/load", value());
  }

  function askFirst(question, verb, act) {
    fill(message, "");
    confirmThen(root, question, verb, act, refuse);
  }

  function refuse(error) {
    fill(message, inFields(error.message));
    if (error.status === 401) context.signInAgain();
  }

  return { ask, load, unload, right, progress };
}

function planElement(plan, state) {
  const now = state.forecast && state.model ? state.forecast : null;
  return [
    h("h2", {}, plan.model),
    h(
      "p",
      { class: "soft" },
      `${count(plan.layers, "layer")} in ${count(groups(plan.stages).length, "stage")} · ${count(plan.max_sequences, "answer")} of ${whole(plan.max_context)} tokens at once`,
    ),
    layerBand(plan.stages, plan.layers),
    plan.forecast
      ? forecast(plan.forecast, now)
      : h("p", { class: "soft" }, "No speed is predicted: a Mac was not measured yet."),
    h(
      "div",
      { class: "scroll", tabindex: "0" },
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["Mac", "Layers", "Weights", "Caches", "Step"].map((name, i) =>
              h("th", { scope: "col", class: i ? "right" : null }, name),
            ),
          ),
        ),
        h(
          "tbody",
          {},
          plan.stages.map((stage) =>
            h(
              "tr",
              {},
              h(
                "th",
                { scope: "row" },
                h("span", { class: "swatch", style: { background: colour(stage.worker) } }),
                stage.worker,
              ),
              h("td", { class: "num right" }, holding(stage)),
              h("td", { class: "num right" }, bytes(stage.weight_bytes)),
              h("td", { class: "num right" }, bytes(stage.cache_bytes)),
              h("td", { class: "num right" }, stage.predicted_ms ? milliseconds(stage.predicted_ms) : "–"),
            ),
          ),
        ),
      ),
    ),
    plan.reasons.length
      ? h(
          "ul",
          { class: "reasons" },
          plan.reasons.map((reason) => h("li", {}, sentence(reason))),
        )
      : null,
    plan.spares.length
      ? h(
          "ul",
          { class: "reasons soft" },
          plan.spares.map((spare) => h("li", {}, `${spare.worker}: ${spare.why}.`)),
        )
      : null,
  ];
}

function forecast(told, now) {
  const speed = (name, users) =>
    quantity(name, figure(told[users]), now ? `tokens a second; now ${figure(now[users])}` : "tokens a second");
  return h(
    "dl",
    { class: "figures" },
    speed("For one user", "one_user"),
    speed("For eight", "eight_users"),
    quantity("First token", `${figure(told.first_token_s)} s`, `after a prompt of ${whole(told.prompt_tokens)} tokens`),
  );
}

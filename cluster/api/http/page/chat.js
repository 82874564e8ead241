// A conversation with the served model. It is kept in this page alone, and is gone when the page is closed.

import { fill, h } from "./dom.js";
import { figure, whole } from "./format.js";
import { markdown } from "./markdown.js";
import { events, send, sentence } from "./server.js";

const DRAW_MS = 80;
/** The most likely token always, as `macpipe chat` does: small models sampled at 1, the API's default, may ramble. */
const TEMPERATURE = 0;
const turns = [];
let parts = null;
let context = null;
let running = null;
let drawing = 0;

/** Show the view in `root`; called again with every snapshot. */
export function showChat(root, given) {
  context = given;
  if (!parts) parts = build(root);
  const { models, state, repair } = context.state;
  const chosen = parts.model.value;
  if (models.join("\n") !== [...parts.model.options].map((one) => one.value).join("\n")) {
    fill(
      parts.model,
      models.map((name) => h("option", { value: name }, name)),
    );
    if (models.includes(chosen)) parts.model.value = chosen;
  }
  parts.model.hidden = !models.length;
  const waiting = {
    recovering: "The cluster recovers; answers go on when it is back.",
    loading: "A model is being loaded.",
    training: "Adapters are being trained.",
    failed: "The model cannot be served now.",
    idle: "No model is loaded.",
  }[state];
  fill(parts.note, state === "recovering" && repair ? `${waiting} ${sentence(repair.cause)}` : (waiting ?? ""));
  renderButtons();
}

function build(root) {
  const log = h("div", { class: "log", role: "log", "aria-label": "Conversation", tabindex: "0" });
  const note = h("p", { class: "small soft", role: "status" });
  const model = h("select", { "aria-label": "Model" });
  const input = h("textarea", {
    rows: 1,
    placeholder: "Ask something",
    "aria-label": "Message",
    onkeydown: onKey,
    oninput: grow,
  });
  const button = h("button", { type: "submit", class: "main" }, "Send");
  const fresh = h("button", { type: "button", class: "quiet", onclick: startOver }, "New chat");
  const form = h(
    "form",
    { class: "composer", onsubmit: onSubmit },
    input,
    h("div", { class: "row" }, model, fresh, h("span", { class: "gap" }), button),
  );
  root.replaceChildren(h("h1", { class: "unseen" }, "Chat"), log, h("div", { class: "foot" }, note, form));
  const made = { log, note, model, input, button, fresh, form };
  fill(log, welcome());
  return made;
}

const welcome = () => h("p", { class: "soft empty" }, "Nothing is stored: a conversation ends with this page.");

function onKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    parts.form.requestSubmit();
  } else if (event.key === "Escape" && running) running.abort();
}

/** Fit the height of the input to its text. */
function grow() {
  parts.input.style.height = "auto";
  parts.input.style.height = `${Math.min(parts.input.scrollHeight, 240)}px`;
}

function startOver() {
  running?.abort();
  turns.length = 0;
  render();
  parts.input.focus();
}

function onSubmit(event) {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const text = parts.input.value.trim();
  if (!text) return;
  parts.input.value = "";
  grow();
  turns.push({ role: "user", content: text });
  answer();
}

/** The messages so far, without those that got no answer: models expect questions and answers in turn. */
function conversation() {
  const messages = [];
  for (const { role, content } of turns) {
    if (role === "assistant" && !content) messages.pop();
    else messages.push({ role, content });
  }
  return messages;
}

async function answer() {
  const turn = { role: "assistant", content: "", reasoning: "", began: performance.now(), tokens: 0 };
  const messages = conversation();
  turns.push(turn);
  running = new AbortController();
  render();
  try {
    const body = { messages, temperature: TEMPERATURE, stream: true, stream_options: { include_usage: true } };
    if (parts.model.value) body.model = parts.model.value;
    const response = await send("POST", "api/answer", body, running.signal);
    for await (const chunk of events(response)) read(turn, chunk);
  } catch (error) {
    if (error.name === "AbortError") turn.end = "stopped";
    else turn.error = error.message;
    if (error.status === 401) context.signInAgain();
  } finally {
    turn.end ??= turn.error ? "failed" : "done";
    turn.seconds = (performance.now() - turn.began) / 1000;
    running = null;
    render();
    parts.input.focus();
  }
}

function read(turn, chunk) {
  if (chunk.error) {
    turn.error = chunk.error.message;
    return;
  }
  if (chunk.usage) turn.tokens = chunk.usage.completion_tokens;
  const delta = chunk.choices[0]?.delta ?? {};
  if (delta.content || delta.reasoning_content) turn.first ??= performance.now();
  turn.content += delta.content ?? "";
  turn.reasoning += delta.reasoning_content ?? "";
  if (chunk.choices[0]?.finish_reason === "length") turn.cut = true;
  if (!drawing) drawing = setTimeout(() => render(), DRAW_MS);
}

function render() {
  clearTimeout(drawing);
  drawing = 0;
  const { log } = parts;
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  fill(log, turns.length ? turns.map(turnElement) : welcome());
  if (atEnd) log.scrollTop = log.scrollHeight;
  renderButtons();
}

function renderButtons() {
  parts.button.textContent = running ? "Stop" : "Send";
  parts.fresh.hidden = !turns.length;
}

function turnElement(turn, i) {
  if (turn.role === "user")
    return h("article", { class: "asked", "data-key": `${i}`, "aria-label": "You" }, h("p", {}, turn.content));
  const thought = turn.reasoning
    ? h("details", { class: "thought" }, h("summary", {}, "Reasoning"), h("div", {}, turn.reasoning))
    : null;
  const waiting =
    !turn.content && !turn.end
      ? h("p", { class: "soft" }, turn.reasoning ? "Thinking …" : "Waiting for the first token …")
      : null;
  return h(
    "article",
    { class: "answer", "data-key": `${i}`, "aria-label": "Answer", "aria-busy": turn.end ? null : "true" },
    thought,
    waiting,
    h("div", { class: "text" }, markdown(turn.content)),
    turn.error ? h("p", { class: "problem", role: "alert" }, turn.error) : null,
    turn.end ? h("p", { class: "small soft num" }, summary(turn)) : null,
  );
}

function summary(turn) {
  const facts = [];
  if (turn.end === "stopped") facts.push("stopped");
  if (turn.cut) facts.push("cut at its maximum length");
  if (turn.tokens) facts.push(`${whole(turn.tokens)} tokens`);
  if (turn.first && turn.tokens > 1) {
    facts.push(`first after ${figure((turn.first - turn.began) / 1000)} s`);
    facts.push(
      `${figure((turn.tokens - 1) / Math.max(0.001, turn.seconds - (turn.first - turn.began) / 1000))} a second`,
    );
  }
  return facts.join(" · ");
}

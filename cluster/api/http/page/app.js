// The page: who is signed in, which view is shown, and the connection to the coordinator.

import { showChat } from "./chat.js";
import { showCluster, stateName } from "./cluster.js";
import { fill, h } from "./dom.js";
import { nameMacs } from "./format.js";
import { History } from "./history.js";
import { showPlan } from "./plan.js";
import { get, post, send, sentence, watch } from "./server.js";

const VIEWS = ["cluster", "chat", "plan"];
const page = Object.fromEntries(
  ["top", "pulse", "who", "main", "login", ...VIEWS].map((id) => [id, document.getElementById(id)]),
);
const history = new History();
let session = null;
let owner;
let state = null;
let stopWatching = null;
let connected = true;

/** What the views need of the page. */
const context = {
  get state() {
    return state;
  },
  get admin() {
    return session?.scope === "admin";
  },
  signInAgain: () => begin(),
};

/** Watch while somebody sees this page: the coordinator takes no snapshots for hidden ones. */
function watchWhileVisible() {
  if (document.hidden || !session?.scope) {
    stopWatching?.();
    stopWatching = null;
  } else {
    stopWatching ??= watch({ state: onState, lost: onLost, refused: onRefused });
  }
}

async function begin() {
  stopWatching?.();
  stopWatching = null;
  try {
    session = await get("api/session");
  } catch (error) {
    session = null;
    showAlone(h("h1", {}, "macpipe"), h("p", { role: "alert" }, error.message));
    setTimeout(begin, 2000);
    return;
  }
  if (!session.scope) {
    showLogin(session.problem);
    return;
  }
  if (owner !== undefined && owner !== session.name) location.reload(); // a conversation is its owner's alone
  owner = session.name;
  page.login.hidden = true;
  page.top.hidden = false;
  watchWhileVisible();
  showView();
}

function onState(facts) {
  connected = true;
  state = facts;
  history.add(facts);
  nameMacs([...facts.stages.map((stage) => stage.worker), ...facts.workers.map((worker) => worker.name)]);
  render();
}

function onLost() {
  connected = false;
  renderPulse();
}

/** The stream ended: the session has ended, or the coordinator restarted. */
async function onRefused() {
  const now = await get("api/session").catch(() => null);
  if (now && !now.scope) begin();
}

function render() {
  renderPulse();
  const view = currentView();
  if (view === "cluster") showCluster(page.cluster, state, history, context);
  if (view === "chat") showChat(page.chat, context);
  if (view === "plan") showPlan(page.plan, context);
}

function renderPulse() {
  if (!connected) {
    page.pulse.className = "bad";
    fill(page.pulse, "Not connected; trying again");
  } else if (state) {
    page.pulse.className = { serving: "good", recovering: "bad", failed: "bad" }[state.state] ?? "note";
    fill(page.pulse, stateName(state));
  }
  document.title = state?.model ? `${state.model} – macpipe` : "macpipe";
  const signOut = h("button", { type: "button", class: "quiet", onclick: endSession }, "Sign out");
  fill(page.who, session?.required ? [h("span", { class: "soft" }, session.name), " ", signOut] : null);
}

function currentView() {
  const view = location.hash.slice(1);
  return VIEWS.includes(view) ? view : VIEWS[0];
}

function showView() {
  const view = currentView();
  for (const name of VIEWS) page[name].hidden = name !== view;
  for (const link of page.top.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (state) render();
  else fill(page[view], h("p", { class: "soft" }, "Asking the coordinator …"));
}

function showAlone(...children) {
  page.top.hidden = true;
  for (const name of VIEWS) page[name].hidden = true;
  page.login.hidden = false;
  fill(page.login, ...children);
}

function showLogin(problem) {
  state = null;
  const key = h("input", {
    id: "key",
    type: "password",
    autocomplete: "current-password",
    required: true,
    spellcheck: "false",
  });
  const message = h("p", { role: "alert", class: "problem" }, sentence(problem));
  const button = h("button", { type: "submit", class: "main" }, "Sign in");
  const form = h("form", { onsubmit: signIn }, h("label", { for: "key" }, "API key"), key, button);
  page.login.replaceChildren();
  showAlone(
    h("h1", {}, "macpipe"),
    h(
      "p",
      { class: "soft" },
      "This cluster needs an API key. Create one on the coordinator’s Mac: ",
      h("code", {}, "macpipe key create NAME"),
      "; with ",
      h("code", {}, "--scope admin"),
      " it may also load models.",
    ),
    form,
    message,
  );
  key.focus();

  async function signIn(event) {
    event.preventDefault();
    button.disabled = true;
    try {
      await post("api/session", { key: key.value });
      await begin();
    } catch (error) {
      fill(message, error.message);
      key.select();
    } finally {
      button.disabled = false;
    }
  }
}

async function endSession() {
  await send("DELETE", "api/session");
  location.reload(); // with the conversation
}

document.addEventListener("visibilitychange", watchWhileVisible);
addEventListener("hashchange", () => {
  showView();
  page.main.focus();
});
begin();

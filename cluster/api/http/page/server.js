// Requests to the coordinator that served this page, and the events that it sends.

import { beginsWithMac } from "./format.js";

/** A request that was refused or failed; `message` is the coordinator's sentence. */
class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a request and return the response. Throws `Refused`. */
export async function send(method, path, body, signal) {
  const options = { method, signal, headers: {} };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The coordinator does not answer. It may have ended, or the network is down.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Refused(response.status, sentence(told?.error?.message ?? `status ${response.status}`));
}

export const get = async (path) => (await send("GET", path)).json();
export const post = async (path, body) => (await send("POST", path, body)).json();

/** Watch the cluster. `on.state(facts)`, `on.lost()` while there is no connection, `on.refused()`: sign in again. */
export function watch(on) {
  let source;
  let retry;
  const open = () => {
    source = new EventSource("api/events");
    source.addEventListener("cluster", (event) => on.state(JSON.parse(event.data)));
    source.addEventListener("failure", () => again());
    source.onerror = () => {
      on.lost();
      if (source.readyState === EventSource.CLOSED) again();
    };
  };
  const again = () => {
    source.close();
    on.refused();
    retry = setTimeout(open, 2000);
  };
  open();
  return () => {
    clearTimeout(retry);
    source.close();
  };
}

/** Yield the data of server-sent events in a response; a chat's end with [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block
        .split("\n")
        .find((line) => line.startsWith("data: "))
        ?.slice(6);
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** A sentence of the coordinator with a full stop, and a capital letter unless it begins with the name of a Mac. */
export const sentence = (text) => {
  if (!text) return "";
  const first = beginsWithMac(text) ? text[0] : text[0].toUpperCase();
  return first + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
};

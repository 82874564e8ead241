// Turns a model's markdown into elements. The text is untrusted: HTML in it stays text, images are never loaded, and
// links lead only to addresses of the web or of mail. marked only splits the text into tokens.

import { h } from "./dom.js";
import { lexer } from "./marked.js";

const SAFE_LINK = /^(https?:|mailto:)/i;
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", "#39": "'" };
const DEEPEST = 40;

/** Return the elements of a text. */
export function markdown(text) {
  return blocks(lexer(text, { gfm: true }), 0);
}

function blocks(tokens, depth) {
  if (depth > DEEPEST) return [tokens.map((token) => token.raw).join("")];
  return tokens.map((token) => block(token, depth + 1)).filter(Boolean);
}

function block(token, depth) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading":
      return h(`h${Math.min(6, token.depth + 2)}`, {}, inline(token.tokens, depth));
    case "paragraph":
      return h("p", {}, inline(token.tokens, depth));
    case "text":
      return h("span", {}, token.tokens ? inline(token.tokens, depth) : decode(token.text));
    case "code":
      return code(token);
    case "blockquote":
      return h("blockquote", {}, blocks(token.tokens, depth));
    case "list":
      return list(token, depth);
    case "table":
      return table(token, depth);
    case "hr":
      return h("hr");
    default:
      return h("p", {}, token.raw);
  }
}

function code(token) {
  const language = (token.lang ?? "").split(/\s/)[0];
  const copy = h(
    "button",
    { type: "button", class: "quiet", onclick: (event) => copyText(event.target, token.text) },
    "Copy",
  );
  const head = h("div", { class: "code-head" }, h("span", {}, language || "text"), copy);
  return h("div", { class: "code" }, head, h("pre", { tabindex: "0" }, h("code", {}, token.text)));
}

async function copyText(button, text) {
  await navigator.clipboard.writeText(text);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function list(token, depth) {
  const items = token.items.map((item) => {
    const box = item.task
      ? h("input", { type: "checkbox", disabled: true, checked: item.checked, "aria-label": "done" })
      : null;
    return h(
      "li",
      { class: item.task ? "task" : null },
      box,
      blocks(
        item.tokens.filter((one) => one.type !== "checkbox"),
        depth,
      ),
    );
  });
  return h(token.ordered ? "ol" : "ul", { start: token.ordered && token.start !== 1 ? token.start : null }, items);
}

function table(token, depth) {
  const cell = (tag, one) =>
    h(tag, { class: one.align, scope: tag === "th" ? "col" : null }, inline(one.tokens, depth));
  const head = h(
    "thead",
    {},
    h(
      "tr",
      {},
      token.header.map((one) => cell("th", one)),
    ),
  );
  const rows = token.rows.map((row) =>
    h(
      "tr",
      {},
      row.map((one) => cell("td", one)),
    ),
  );
  return h("div", { class: "scroll", tabindex: "0" }, h("table", {}, head, h("tbody", {}, rows)));
}

function inline(tokens, depth) {
  if (depth > DEEPEST) return [tokens.map((token) => token.raw).join("")];
  return (tokens ?? []).map((token) => span(token, depth + 1));
}

function span(token, depth) {
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
      return h(token.type, {}, inline(token.tokens, depth));
    case "codespan":
      return h("code", {}, token.text);
    case "br":
      return h("br");
    case "link":
      return link(token.href, inline(token.tokens, depth));
    case "image":
      return link(token.href, [`image: ${token.text || token.href}`]);
    case "escape":
      return token.text;
    case "text":
      return token.tokens ? h("span", {}, inline(token.tokens, depth)) : decode(token.text);
    default:
      return token.raw;
  }
}

function link(href, children) {
  if (!SAFE_LINK.test(href)) return h("span", {}, children);
  return h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}

/** Replace character references, which marked leaves to HTML. */
function decode(text) {
  return text.replace(/&(#x[0-9a-f]{1,6}|#[0-9]{1,7}|[a-z]{2,5});/gi, (whole, name) => {
    if (name in NAMED) return NAMED[name];
    if (name[0] !== "#") return whole;
    const point = /^#x/i.test(name) ? parseInt(name.slice(2), 16) : Number(name.slice(1));
    return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : whole;
  });
}

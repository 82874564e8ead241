// Builds and updates elements. No text is ever parsed as HTML: texts become text nodes.

const SVG = "http://www.w3.org/2000/svg";
/** Attributes that are not taken away: styles are compared as a whole, and people open details themselves. */
const KEPT = new Set(["style", "open"]);
const SVG_TAGS = new Set(["svg", "polyline", "line", "rect"]);

/** Return an element. `props`: attributes; `on*`: listeners; `style`: an object; `value` and `checked`: properties. */
export function h(tag, props = {}, ...children) {
  const node = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") for (const [property, one] of Object.entries(value)) node.style.setProperty(property, one);
    else if (name.startsWith("on") || name === "value" || name === "checked") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...present(children));
  return node;
}

/** Return nested children as one list, without those that are null, undefined or false. */
const present = (children) =>
  children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);

/** Make the children of `parent` equal to `children`, and keep the nodes that need no change: so selections stay. */
export function fill(parent, ...children) {
  const nodes = present(children).map((child) => (child instanceof Node ? child : document.createTextNode(child)));
  nodes.forEach((node, i) => {
    const old = parent.childNodes[i];
    if (!old) parent.append(node);
    else if (!update(old, node)) parent.replaceChild(node, old);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

/** Make `old` equal to `node` in place. Return false if they are of different kinds. */
function update(old, node) {
  if (old.nodeType !== node.nodeType || old.nodeName !== node.nodeName) return false;
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== node.data) old.data = node.data;
    return true;
  }
  if (old.getAttribute("data-key") !== node.getAttribute("data-key")) return false;
  for (const { name } of [...old.attributes])
    if (!KEPT.has(name) && !node.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of node.attributes) {
    if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.style.cssText !== node.style.cssText) old.style.cssText = node.style.cssText;
  old.onclick = node.onclick;
  fill(old, ...node.childNodes);
  return true;
}

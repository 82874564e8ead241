// Asks a person before something is done that others notice.

import { h } from "./dom.js";

/** Ask `question` in a dialog; after `verb`, await `act()`. An error is given to `refuse`. */
export function confirmThen(root, question, verb, act, refuse) {
  const dialog = h(
    "dialog",
    { "aria-label": question },
    h(
      "form",
      { method: "dialog" },
      h("p", {}, question),
      h(
        "div",
        { class: "row" },
        h("button", { value: "no", autofocus: true }, "Cancel"),
        h("button", { value: "yes", class: "main" }, verb),
      ),
    ),
  );
  dialog.onclose = async () => {
    dialog.remove();
    if (dialog.returnValue !== "yes") return;
    try {
      await act();
    } catch (error) {
      refuse(error);
    }
  };
  root.append(dialog);
  dialog.showModal();
}

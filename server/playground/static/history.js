// The runs of this tab, newest first: kept in memory, gone when the tab is closed.

import { el } from "./dom.js";

const MOST = 30;

export class History {
  /**
   * @param {HTMLElement} root hidden while there is nothing
   * @param {(run: object) => void} restore shows a run again
   */
  constructor(root, restore) {
    this.root = root;
    this.restore = restore;
    this.runs = [];
  }

  /** Keep a run: `{settings, answers, summary}`. */
  add(run) {
    this.runs = [{ ...run, at: new Date() }, ...this.runs].slice(0, MOST);
    this.root.hidden = false;
    this.root.querySelector("ol").replaceChildren(
      ...this.runs.map((each) =>
        el(
          "li",
          {},
          el(
            "button",
            { type: "button", class: "run", onclick: () => this.restore(each) },
            el("time", { dateTime: each.at.toISOString() }, each.at.toLocaleTimeString()),
            el("span", { class: "excerpt" }, each.settings.prompt.trim().slice(0, 120)),
            el("span", { class: "hint" }, each.summary),
          ),
        ),
      ),
    );
  }
}

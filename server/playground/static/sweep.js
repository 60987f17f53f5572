// One prompt at five thresholds: how the answer changes with the share of tokens that experts write.

import * as api from "./api.js";
import { el } from "./dom.js";
import { shown, spread } from "./odds.js";
import { styleOf } from "./sources.js";

/**
 * Runs the requests and shows a row for each as it is answered, the share as a bar.
 * @param {object} request the joint model's, streaming or not
 * @param {number[]} probabilities of the last answer; the thresholds are spread over them
 * @param {string[]} experts
 * @param {(threshold: number) => void} take what a row's button does
 * @returns {Promise<void>} when all are answered
 */
export async function sweep(root, request, probabilities, experts, take, key, signal) {
  const thresholds = spread(probabilities);
  const body = el("tbody");
  root.replaceChildren(
    el("h2", {}, "Share of expert tokens against the answer"),
    el(
      "div",
      { class: "table" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, ...["Threshold", "By experts", "Answer"].map((name) => el("th", { scope: "col" }, name)))),
        body,
      ),
    ),
  );
  root.hidden = false;
  let before = null;
  // One after the other: each finds the prompt in the prefix cache, and a browser has few connections.
  for (const threshold of thresholds) {
    const { stream: _, ...whole } = request;
    const collaboration = { ...request.collaboration, threshold, share: undefined };
    const choice = await api.complete({ ...whole, collaboration }, key, signal);
    const tokens = api.tokensOf(choice);
    const text = tokens.map((token) => token.text).join("");
    const share = tokens.length ? tokens.filter((token) => token.source !== "base").length / tokens.length : 0;
    const meter = el("div", { class: "share", "aria-hidden": "true" });
    meter.style.setProperty("--share", share);
    body.append(
      el(
        "tr",
        {},
        el("td", {}, el("button", { type: "button", class: "small", onclick: () => take(threshold) }, shown(threshold))),
        el("td", { class: "number" }, `${Math.round(100 * share)} %`, meter),
        el(
          "td",
          { class: "answer" },
          ...(text === before ? [el("span", { class: "hint" }, "as above")] : tokens.map((token) => painted(token, experts))),
        ),
      ),
    );
    before = text;
  }
}

function painted(token, experts) {
  return el("span", { class: `token ${styleOf(token.source, experts)}`, textContent: token.text });
}

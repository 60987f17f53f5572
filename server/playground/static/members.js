// What each member would have written at a position of an answer: asked when a token is clicked, by the token ids before
// it, which the members have in their prefix caches.

import * as api from "./api.js";
import { el } from "./dom.js";
import { shown } from "./odds.js";
import { quoted } from "./sources.js";

const ALTERNATIVES = 5;

/**
 * A table of the members' most probable tokens there.
 * @param {{tokens: api.Token[], prompt: number[]|null}} card
 * @param {number} number of the token
 * @param {{id: string, name: string}[]} members
 */
export async function compare(card, number, members, key) {
  const ids = card.tokens.slice(0, number).map((token) => token.id);
  if (card.prompt === null || ids.includes(undefined)) {
    return el("p", { class: "hint" }, "The server does not tell the token ids of this answer, so its members cannot be asked.");
  }
  const rows = await Promise.all(members.map((member) => ask(member, [...card.prompt, ...ids], key)));
  const { text, source } = card.tokens[number];
  return el(
    "div",
    {},
    el("h3", {}, `What each model would write in place of ${quoted(text)} (written by ${source})`),
    el("div", { class: "table", tabIndex: 0, role: "group", "aria-label": "The members' most probable tokens" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Model"),
          el("th", { scope: "col", colSpan: ALTERNATIVES }, `Its ${ALTERNATIVES} most probable tokens`))),
        el("tbody", {}, ...members.map((member, i) => row(member, rows[i], text))),
      ),
    ),
  );
}

async function ask(member, prompt, key) {
  const body = { model: member.id, prompt, max_tokens: 1, temperature: 0, logprobs: ALTERNATIVES };
  try {
    const { top_logprobs: top } = (await api.complete(body, key)).logprobs;
    return Object.entries(top[0] ?? {}).sort(([, a], [, b]) => b - a).slice(0, ALTERNATIVES);
  } catch (error) {
    return error;
  }
}

function row(member, found, written) {
  const head = el("th", { scope: "row" }, member.name);
  if (found instanceof Error) return el("tr", {}, head, el("td", { colSpan: ALTERNATIVES }, found.message));
  return el("tr", {}, head, ...found.map(([text, logprob]) => {
    const cell = el("td", { class: text === written ? "written" : "" }, el("b", {}, text === "" ? "end" : quoted(text)), ` ${shown(Math.exp(logprob))}`);
    cell.style.setProperty("--p", Math.exp(logprob));
    return cell;
  }));
}

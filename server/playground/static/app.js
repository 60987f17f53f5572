// The page: what is served, runs, and what stands around them.

import * as api from "./api.js";
import { Card } from "./card.js";
import { LANGUAGES, showCode } from "./code.js";
import { byId, copyFrom, el } from "./dom.js";
import { examplesFor, kindFor } from "./examples.js";
import { History } from "./history.js";
import { cameBack, keep, kept } from "./kept.js";
import { savedKey, saveKey } from "./key.js";
import { linked, linkTo } from "./link.js";
import { compare } from "./members.js";
import { shown } from "./odds.js";
import { Settings } from "./settings.js";
import { sweep } from "./sweep.js";

const RETRY_MS = 2000;
const WATCH_MS = 10000; // between looks at a server that was ready, in a tab that is seen
const FIRST_CARDS = 4; // shown at first: the joint model and three members
const AT_ONCE = 4; // requests of a run in flight: browsers open six connections to a server, and queue the rest unseen

const ui = Object.fromEntries(
  ["form", "prompt", "examples", "run", "stop", "auto", "models", "key", "answers", "metrics", "status", "notice", "announce",
    "copy", "share", "sweep", "sweep-result", "threshold", "policy", "blend", "rate", "experts", "history",
  ].map((id) => [id, byId(id)]),
);

const state = {
  served: null,
  cards: [],
  running: null, // AbortController
  retry: 0,
};
const settings = new Settings({ changed: settingsChanged });
const history = new History(ui.history, restore);

// What is served

async function connect() {
  clearTimeout(state.retry);
  const key = typedKey();
  // An address that is opened by a click is sent without a key.
  ui.metrics.hidden = key !== "";
  try {
    const served = await api.models(key);
    saveKey(key);
    if (ui.notice.dataset.of === "connection") notice("");
    if (JSON.stringify(served) !== JSON.stringify(state.served)) show(served);
    const { ready, reason } = await api.readiness();
    setStatus(ready ? "ready" : "waiting", ready ? "ready" : reason);
    state.retry = ready ? setTimeout(watch, WATCH_MS) : setTimeout(connect, RETRY_MS);
  } catch (error) {
    const refused = error.status === 401;
    setStatus("failed", refused ? (key ? "wrong key" : "needs a key") : "not connected");
    notice(refused ? refusal(key) : error.message, "connection");
    if (refused) {
      saveKey("");
      ui.metrics.hidden = true;
      ui.key.focus();
    } else state.retry = setTimeout(connect, RETRY_MS);
  }
}

/** See that the server is still ready; it may have ended, or be starting anew with other models. */
async function watch() {
  clearTimeout(state.retry);
  if (!document.hidden && !(await api.readiness()).ready) await connect();
  else state.retry = setTimeout(watch, WATCH_MS);
}

function typedKey() {
  return ui.key.value.trim();
}

function refusal(key) {
  return key ? "The server does not take this API key." : "This server asks for an API key: enter it under the settings.";
}

/** @param {"connection"|"run"} of what it is about; a connection that comes back takes its own away */
function notice(text, of = "run") {
  ui.notice.textContent = text;
  ui.notice.dataset.of = of;
  ui.notice.hidden = text === "";
}

function setStatus(kind, text) {
  ui.status.dataset.kind = kind;
  ui.status.textContent = text;
}

function show(served) {
  const first = state.served === null;
  state.served = served;
  document.title = `${served.joint} – Co-LLM playground`;
  const experts = served.members.map((member) => member.name).filter((name) => name !== "base");
  const all = [
    { id: served.joint, title: "Together", joint: true },
    ...served.members.map((member) => ({ id: member.id, title: `${member.name} alone`, joint: false })),
    ...served.blended.map((id) => ({ id, title: id, joint: false })),
  ];
  state.cards = all.map((model) => new Card(model, experts, { inspect, reply }));
  ui.answers.replaceChildren(...state.cards.map((card) => card.root));
  ui.models.replaceChildren(
    ui.models.querySelector("legend"),
    ...state.cards.map((card, number) =>
      el("label", { class: "check" }, el("input", { type: "checkbox", checked: number < FIRST_CARDS, value: card.model.id }), card.model.title),
    ),
  );
  settings.serve(served);
  if (first) ui.form.elements.kind.value = kindFor(served);
  ui.examples.replaceChildren(
    ...examplesFor(served).map((example) =>
      el("button", { type: "button", class: "chip", onclick: () => choose(example) }, example.chat),
    ),
  );
  if (first) {
    const made = cameBack() ? kept() ?? linked() : linked() ?? kept();
    if (made) settings.write(made);
  }
  if (!ui.prompt.value) ui.prompt.value = examplesFor(served)[0][settings.kind];
  showSelected();
  settingsChanged();
}

function choose(example) {
  ui.prompt.value = example[settings.kind];
  settings.takeTurns([]);
  run();
}

/** An example that nobody has changed goes along when the kind of prompt changes. */
function kindChanged() {
  if (!state.served) return;
  const before = settings.kind === "chat" ? "text" : "chat";
  const example = examplesFor(state.served).find((each) => each[before] === ui.prompt.value);
  if (example) ui.prompt.value = example[settings.kind];
}

// Settings

function settingsChanged() {
  for (const card of state.cards) card.setThreshold(card.model.joint ? settings.effectiveThreshold : null, settings.policy);
  if (state.served) showCode(settings.request({ id: state.served.joint, joint: true }), typedKey() !== "");
  ui.sweep.disabled = !state.served || settings.effectiveThreshold === null;
}

function selectedCards() {
  const chosen = new Set([...ui.models.querySelectorAll("input:checked")].map((box) => box.value));
  return state.cards.filter((card) => chosen.has(card.model.id));
}

function showSelected() {
  const selected = selectedCards();
  for (const card of state.cards) card.root.hidden = !selected.includes(card);
  // Up to three stand in one row; of more, the joint model has a row of its own.
  ui.answers.classList.toggle("many", selected.length > 3);
  ui.run.disabled = state.running !== null || !selected.length;
}

// Running

/** Take over from what is running. */
function begin() {
  state.running?.abort();
  const running = new AbortController();
  state.running = running;
  ui.run.disabled = true;
  ui.stop.disabled = false;
  ui.announce.textContent = "Running";
  notice("");
  return running;
}

/** Whether this was still what is running. */
function finish(running) {
  if (state.running !== running) return false;
  state.running = null;
  ui.stop.disabled = true;
  showSelected();
  if (document.activeElement === ui.stop || document.activeElement === document.body) ui.run.focus({ preventScroll: true });
  return true;
}

async function run() {
  if (!state.served || !ui.form.reportValidity() || !selectedCards().length) return;
  const running = begin();
  ui["sweep-result"].hidden = true;
  // On a phone the answers are below the settings.
  if (ui.answers.getBoundingClientRect().top > innerHeight * 0.8) ui.answers.scrollIntoView({ block: "start" });
  const cards = selectedCards();
  const made = settings.read();
  const start = { policy: settings.policy, threshold: settings.effectiveThreshold, chat: settings.kind === "chat", messages: settings.messages() };
  const jobs = cards.map((card) => {
    card.begin(start);
    return { card, body: settings.request(card.model) };
  });
  const errors = [];
  const take = async () => {
    for (let job = jobs.shift(); job; job = jobs.shift()) errors.push(await runCard(job, running.signal));
  };
  await Promise.all(Array.from({ length: AT_ONCE }, take));
  if (!finish(running)) return;
  showErrors(cards, errors.filter(Boolean));
  ui.announce.textContent = cards.map(summary).join(" ");
  history.add({ settings: made, answers: new Map(cards.map((card) => [card.model.id, card.record()])), summary: inShort(cards, made) });
}

/** What every panel would say is said once, above them. */
function showErrors(cards, errors) {
  const messages = new Set(errors.map((error) => error.message));
  const once = cards.length > 1 && errors.length === cards.length && messages.size === 1;
  for (const card of cards) if (card.finish === "error") card.error.hidden = once;
  if (once) notice(errors[0].code ? `${errors[0].message} (${errors[0].code})` : errors[0].message);
}

/** Runs one request; gives the error that ended it, or null. */
async function runCard({ card, body }, signal) {
  if (signal.aborted) {
    card.end("stopped");
    return null;
  }
  let ended = null;
  card.sent();
  try {
    for await (const piece of api.answer({ ...body, ...details(body) }, typedKey(), signal)) {
      if (signal.aborted) break;
      card.add(piece);
      ended = piece.finish ?? ended;
    }
    card.end(signal.aborted ? "stopped" : ended);
    return null;
  } catch (error) {
    if (error.name === "AbortError") {
      card.end("stopped");
      return null;
    }
    const told = error instanceof api.ApiError ? error : new api.ApiError("The answer could not be read.");
    card.fail(told);
    if (told.status === 401) ui.key.focus();
    if (told.status === 0 || told.status === 503) connect();
    if (told !== error) throw error;
    return told;
  }
}

/** What the page asks for beside what the user set: token ids and each token's probability. */
function details(body) {
  return { return_token_ids: true, logprobs: "messages" in body ? true : 0 };
}

function summary(card) {
  if (card.finish === "error") return `${card.model.title}: ${card.error.textContent}`;
  const counts = [...card.counts].map(([source, count]) => `${count} by ${source}`).join(", ");
  return `${card.model.title}: ${card.answer().trim()} (${counts || "no tokens"}).`;
}

function inShort(cards, made) {
  const joint = cards.find((card) => card.model.joint) ?? cards[0];
  const counts = [...joint.counts].map(([source, count]) => `${count} ${source}`).join(", ");
  const { policy, threshold } = joint.run;
  const blend = joint.model.joint && made.blend ? `, ${made.blend}` : "";
  return `${policy}${threshold === null ? "" : ` ${shown(threshold)}`}${blend}: ${counts || joint.finish}`;
}

/** Show a run of the history again: its settings and its answers. */
function restore({ settings: made, answers }) {
  state.running?.abort();
  settings.write(made);
  for (const card of state.cards) {
    const found = answers.get(card.model.id);
    const box = [...ui.models.querySelectorAll("input")].find((each) => each.value === card.model.id);
    box.checked = Boolean(found);
    if (found) card.restore(found);
  }
  showSelected();
  settingsChanged();
  ui.answers.scrollIntoView({ block: "nearest" });
}

/** Go on with the conversation after an answer. */
function reply(card) {
  settings.takeTurns([...card.run.messages.filter(({ role }) => role !== "system"), { role: "assistant", content: card.answer() }]);
  ui.prompt.value = "";
  ui.prompt.focus();
}

function inspect(card, number) {
  return compare(card, number, state.served.members, typedKey());
}

async function runSweep() {
  if (!state.served || !ui.form.reportValidity()) return;
  const running = begin();
  const joint = state.cards.find((card) => card.model.joint);
  const comparable = joint.run?.policy === settings.policy;
  const probabilities = comparable ? joint.tokens.map(({ p }) => p).filter((p) => p !== null) : [];
  const take = (threshold) => {
    settings.takeThreshold(threshold);
    run();
  };
  try {
    const body = settings.request(joint.model);
    await sweep(ui["sweep-result"], body, probabilities, joint.experts, take, typedKey(), running.signal);
    if (state.running === running) ui.announce.textContent = "Five thresholds are answered.";
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message);
  } finally {
    finish(running);
  }
}

// Code and links

function copy() {
  const shown = document.querySelector(".code pre:not([hidden])");
  copyFrom(ui.copy, shown.textContent, shown);
}

function share() {
  const link = linkTo(settings.read());
  window.history.replaceState(null, "", link);
  copyFrom(ui.share, link, ui.status, "Link is in the address");
}

function chooseTab(chosen) {
  for (const name of LANGUAGES) {
    const selected = name === chosen;
    byId(`tab-${name}`).setAttribute("aria-selected", String(selected));
    byId(`tab-${name}`).tabIndex = selected ? 0 : -1;
    byId(`code-${name}`).hidden = !selected;
  }
}

// Events

ui.form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
for (const kind of ["input", "change"]) {
  ui.form.addEventListener(kind, (event) => {
    if (ui.models.contains(event.target)) showSelected();
    if (event.type === "change" && event.target.name === "kind") kindChanged();
    settings.show();
    settingsChanged();
  });
}
for (const control of [ui.policy, ui.blend, ui.threshold, byId("share-of-tokens"), ui.rate, ui.experts]) {
  control.addEventListener("change", () => ui.auto.checked && run());
}
byId("threshold-reset").addEventListener("click", () => ui.auto.checked && run());
ui.key.addEventListener("change", connect);
ui.stop.addEventListener("click", () => state.running?.abort());
ui.sweep.addEventListener("click", runSweep);
ui.copy.addEventListener("click", copy);
ui.share.addEventListener("click", share);
for (const name of LANGUAGES) {
  const tab = byId(`tab-${name}`);
  tab.addEventListener("click", () => chooseTab(name));
  tab.addEventListener("keydown", (event) => {
    const at = LANGUAGES.indexOf(name);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: LANGUAGES.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const other = LANGUAGES.at(to % LANGUAGES.length);
    chooseTab(other);
    byId(`tab-${other}`).focus();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") state.running?.abort();
});

window.addEventListener("pagehide", () => state.served && keep(settings.read()));

ui.key.value = savedKey();
showSelected();
connect();

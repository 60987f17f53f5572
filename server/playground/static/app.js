// The page: settings in, requests out, answers into cards.

import * as api from "./api.js";
import { Card } from "./card.js";
import { asCurl, asPython } from "./code.js";
import { byId, el } from "./dom.js";
import { examplesFor } from "./examples.js";
import { savedKey, saveKey } from "./key.js";

const POLICIES = {
  threshold: { label: "The gate, by threshold", hint: "An expert writes where the gate's probability is above the threshold.", gate: true },
  sample: { label: "The gate, by drawing", hint: "An expert writes with the gate's probability.", gate: true },
  confidence: { label: "The base's confidence", hint: "An expert writes where 1 − the base's top probability is above the threshold. Needs no gate." },
  random: { label: "Chance", hint: "An expert writes with a fixed probability: what a gate has to beat." },
  always: { label: "Always the expert", hint: "The expert writes every token." },
  never: { label: "Never the expert", hint: "The base writes every token." },
};
const RETRY_MS = 2000;

const ui = Object.fromEntries(
  ["form", "prompt", "examples", "run", "stop", "policy", "policy-hint", "threshold", "threshold-field", "threshold-value",
    "threshold-reset", "rate", "rate-field", "rate-value", "auto", "max-tokens", "temperature", "seed", "models", "key",
    "answers", "metrics", "status", "notice", "announce", "copy", "tab-curl", "tab-python", "code-curl", "code-python",
  ].map((id) => [id, byId(id)]),
);

const state = {
  served: null, // { joint, members }
  defaults: { gate: true, threshold: null, version: "" },
  threshold: null, // null: the gate's
  cards: [],
  running: null, // AbortController
  retry: 0,
};

// What is served

async function connect() {
  clearTimeout(state.retry);
  const key = typedKey();
  // An address that is opened by a click is sent without a key.
  ui.metrics.hidden = key !== "";
  try {
    const served = await api.models(key);
    state.defaults = await api.defaults(key);
    saveKey(key);
    ui.notice.hidden = true;
    if (JSON.stringify(served) !== JSON.stringify(state.served)) show(served);
    setDefaults();
    const { ready, reason } = await api.readiness();
    setStatus(ready ? "ready" : "waiting", ready ? `ready · version ${state.defaults.version}` : reason);
    if (!ready) state.retry = setTimeout(connect, RETRY_MS);
  } catch (error) {
    const refused = error.status === 401;
    setStatus("failed", refused ? (key ? "wrong key" : "needs a key") : "not connected");
    ui.notice.textContent = refused ? refusal(key) : error.message;
    ui.notice.hidden = false;
    if (refused) {
      saveKey("");
      ui.metrics.hidden = true;
      ui.key.focus();
    } else state.retry = setTimeout(connect, RETRY_MS);
  }
}

function typedKey() {
  return ui.key.value.trim();
}

function refusal(key) {
  return key ? "The server does not take this API key." : "This server asks for an API key: enter it under the settings.";
}

function setStatus(kind, text) {
  ui.status.dataset.kind = kind;
  ui.status.textContent = text;
}

function show(served) {
  state.served = served;
  document.title = `${served.joint} – Co-LLM playground`;
  const experts = served.members.map((member) => member.name).filter((name) => name !== "base");
  const all = [
    { id: served.joint, title: "Together", joint: true },
    ...served.members.map((member) => ({ id: member.id, title: `${member.name} alone`, joint: false })),
  ];
  state.cards = all.map((model) => new Card(model, experts));
  ui.answers.replaceChildren(...state.cards.map((card) => card.root));
  const legend = ui.models.querySelector("legend");
  ui.models.replaceChildren(
    legend,
    ...state.cards.map((card) =>
      el("label", { class: "check" }, el("input", { type: "checkbox", checked: true, value: card.model.id }), card.model.title),
    ),
  );
  showSelected();
  ui.examples.replaceChildren(
    ...examplesFor(served.joint).map((example) =>
      el("button", { type: "button", class: "chip", onclick: () => choose(example) }, example.chat),
    ),
  );
  if (!ui.prompt.value) ui.prompt.value = examplesFor(served.joint)[0][kind()];
}

function setDefaults() {
  const chosen = ui.policy.value;
  ui.policy.replaceChildren(
    ...Object.entries(POLICIES).map(([name, { label, gate }]) =>
      el("option", { value: name, disabled: Boolean(gate) && !state.defaults.gate }, label),
    ),
  );
  const possible = chosen && (state.defaults.gate || !POLICIES[chosen].gate);
  ui.policy.value = possible ? chosen : state.defaults.gate ? "threshold" : "confidence";
  settingsChanged();
}

function choose(example) {
  ui.prompt.value = example[kind()];
  showCode();
  run();
}

/** What the prompt is: "text" to continue, or a "chat" message. */
function kind() {
  return ui.form.elements.kind.value;
}

/** An example that nobody has changed goes along when the kind of prompt changes. */
function kindChanged() {
  if (!state.served) return;
  const before = kind() === "chat" ? "text" : "chat";
  const example = examplesFor(state.served.joint).find((each) => each[before] === ui.prompt.value);
  if (example) ui.prompt.value = example[kind()];
}

// Settings

/** The threshold that counts: the user's, or the gate's; null where the policy has none. */
function threshold() {
  if (!["threshold", "confidence"].includes(ui.policy.value)) return null;
  return state.threshold ?? state.defaults.threshold ?? 0.5;
}

function settingsChanged() {
  const policy = ui.policy.value;
  ui["policy-hint"].textContent = POLICIES[policy]?.hint ?? "";
  const at = threshold();
  ui["threshold-field"].hidden = at === null;
  ui["rate-field"].hidden = policy !== "random";
  if (at !== null) {
    ui.threshold.value = at;
    const own = state.threshold !== null;
    ui["threshold-value"].textContent = own || state.defaults.threshold === null ? at.toFixed(2) : `${at.toFixed(2)}, the gate's`;
    ui["threshold-reset"].hidden = !own || state.defaults.threshold === null;
  }
  ui["rate-value"].textContent = Number(ui.rate.value).toFixed(2);
  for (const card of state.cards) card.setThreshold(card.model.joint ? at : null);
  showCode();
}

function collaboration() {
  const policy = ui.policy.value;
  const chosen = {};
  if (policy !== "threshold" || !state.defaults.gate) chosen.policy = policy;
  if (threshold() !== null && (state.threshold !== null || state.defaults.threshold === null)) chosen.threshold = threshold();
  if (policy === "random") chosen.rate = Number(ui.rate.value);
  return { ...chosen, report: true };
}

function requestFor(model) {
  const text = ui.prompt.value;
  const body = {
    model: model.id,
    ...(kind() === "chat" ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
    max_tokens: Number(ui["max-tokens"].value),
    temperature: Number(ui.temperature.value),
  };
  if (ui.seed.value !== "") body.seed = Number(ui.seed.value);
  return { ...body, stream: true, collaboration: model.joint ? collaboration() : { report: true } };
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

async function run() {
  if (!state.served || !ui.form.reportValidity() || !selectedCards().length) return;
  state.running?.abort();
  const running = new AbortController();
  state.running = running;
  ui.run.disabled = true;
  ui.stop.disabled = false;
  ui.announce.textContent = "Running";
  // On a phone the answers are below the settings.
  if (ui.answers.getBoundingClientRect().top > innerHeight * 0.8) ui.answers.scrollIntoView({ block: "start" });
  const cards = selectedCards();
  await Promise.all(cards.map((card) => runCard(card, running.signal)));
  if (state.running !== running) return;
  state.running = null;
  ui.stop.disabled = true;
  showSelected();
  if (document.activeElement === ui.stop || document.activeElement === document.body) ui.run.focus({ preventScroll: true });
  ui.announce.textContent = cards.map(summary).join(" ");
}

async function runCard(card, signal) {
  card.begin();
  let finish = null;
  try {
    for await (const piece of api.answer(requestFor(card.model), typedKey(), signal)) {
      if (signal.aborted) break;
      card.add(piece.tokens);
      finish = piece.finish ?? finish;
    }
    card.end(signal.aborted ? "stopped" : finish);
  } catch (error) {
    if (error.name === "AbortError") {
      card.end("stopped");
      return;
    }
    card.fail(error instanceof api.ApiError ? error : new api.ApiError("The answer could not be read."));
    if (error.status === 401) ui.key.focus();
    if (error.status === 0 || error.status === 503) connect();
    if (!(error instanceof api.ApiError)) throw error;
  }
}

function summary(card) {
  if (!card.error.hidden) return `${card.model.title}: ${card.error.textContent}`;
  const counts = [...card.counts()].map(([source, count]) => `${count} by ${source}`).join(", ");
  return `${card.model.title}: ${card.tokens.map((token) => token.text).join("").trim()} (${counts || "no tokens"}).`;
}

// Code

function showCode() {
  if (!state.served) return;
  const body = requestFor({ id: state.served.joint, joint: true });
  const withKey = typedKey() !== "";
  ui["code-curl"].textContent = asCurl(api.address(api.route(body)), body, withKey);
  ui["code-python"].textContent = asPython(api.address("v1"), body, withKey);
}

function chooseTab(chosen) {
  for (const name of ["curl", "python"]) {
    const selected = name === chosen;
    ui[`tab-${name}`].setAttribute("aria-selected", String(selected));
    ui[`tab-${name}`].tabIndex = selected ? 0 : -1;
    ui[`code-${name}`].hidden = !selected;
  }
}

async function copy() {
  const shown = ui["code-curl"].hidden ? ui["code-python"] : ui["code-curl"];
  let done = true;
  try {
    await navigator.clipboard.writeText(shown.textContent);
  } catch {
    // No clipboard (a page that came over plain http from another machine): select it, for Ctrl+C.
    getSelection().selectAllChildren(shown);
    done = document.execCommand("copy");
  }
  ui.copy.textContent = done ? "Copied" : "Selected";
  setTimeout(() => (ui.copy.textContent = "Copy"), 1500);
}

// Events

ui.form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
for (const kind of ["input", "change"]) {
  ui.form.addEventListener(kind, (event) => {
    if (event.target === ui.threshold) state.threshold = Number(ui.threshold.value);
    if (ui.models.contains(event.target)) showSelected();
    if (event.type === "change" && event.target.name === "kind") kindChanged();
    settingsChanged();
  });
}
for (const control of [ui.policy, ui.threshold, ui.rate]) {
  control.addEventListener("change", () => ui.auto.checked && run());
}
ui["threshold-reset"].addEventListener("click", () => {
  state.threshold = null;
  settingsChanged();
  ui.threshold.focus();
  if (ui.auto.checked) run();
});
ui.key.addEventListener("change", connect);
ui.stop.addEventListener("click", () => state.running?.abort());
ui.copy.addEventListener("click", copy);
for (const name of ["curl", "python"]) {
  ui[`tab-${name}`].addEventListener("click", () => chooseTab(name));
  ui[`tab-${name}`].addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const other = name === "curl" ? "python" : "curl";
    chooseTab(other);
    ui[`tab-${other}`].focus();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") state.running?.abort();
});

ui.key.value = savedKey();
setDefaults();
showSelected();
connect();

// Trying a route out on the page of the API reference: a request that can be edited, and what the server answers.

import { address, request } from "./api.js";
import { el } from "./dom.js";
import { authorization } from "./key.js";

/**
 * A folded form that sends a request to a route.
 * @param {string} id prefix of the ids of the form's fields
 * @param {string} method
 * @param {string} path with its parameters in braces
 * @param {{parameters: object[], example: object|undefined}} operation path parameters, and a body to begin with
 * @param {() => string} key the API key to send, "" for none
 */
export function tryOut(id, method, path, { parameters, example }, key) {
  const values = parameters.map((each) =>
    el("input", { type: "text", id: `${id}-${each.name}`, required: true, value: each.example ?? "", autocomplete: "off", spellcheck: false }),
  );
  const body = example
    ? el("textarea", { id: `${id}-body`, rows: JSON.stringify(example, null, 2).split("\n").length, spellcheck: false, value: JSON.stringify(example, null, 2) })
    : null;
  const send = el("button", { type: "submit", class: "primary" }, "Send");
  const stop = el("button", { type: "button", disabled: true }, "Stop");
  const status = el("p", { class: "answer-status", role: "status" });
  const answer = el("pre", { class: "answer", tabIndex: 0, hidden: true, "aria-label": "Answer" });
  let running = null;

  async function run() {
    running?.abort();
    const control = (running = new AbortController());
    const begin = performance.now();
    answer.replaceChildren();
    answer.hidden = true;
    status.textContent = "waiting";
    stop.disabled = false;
    let told = "";
    try {
      const filled = parameters.reduce((found, each, i) => found.replace(`{${each.name}}`, encoded(values[i].value)), path);
      const headers = { ...authorization(key()), ...(body ? { "Content-Type": "application/json" } : {}) };
      const response = await request(filled.slice(1), { method, headers, body: body?.value }, control.signal);
      told = `${response.status} ${response.statusText}`.trim();
      await show(response, (text) => {
        answer.hidden = false;
        answer.append(text);
        status.textContent = told;
      });
      status.textContent = `${told}, ${Math.round(performance.now() - begin)} ms`;
    } catch (error) {
      if (running === control) status.textContent = error.name === "AbortError" ? `${told} stopped`.trim() : error.message;
    } finally {
      if (running === control) stop.disabled = true;
    }
  }

  const form = el(
    "form",
    { autocomplete: "off" },
    ...values.flatMap((input, i) => [el("label", { class: "label", for: input.id }, parameters[i].name), input]),
    ...(body ? [el("label", { class: "label", for: body.id }, "Body"), body] : []),
    el("div", { class: "actions" }, send, stop, el("span", { class: "hint" }, `${method} ${address(path.slice(1)).replaceAll("%7B", "{").replaceAll("%7D", "}")}`)),
    status,
    answer,
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  stop.addEventListener("click", () => running?.abort());
  return el("details", { class: "try" }, el("summary", {}, "Try it"), form);
}

/** A path parameter; the slashes of a member's name stay. */
function encoded(value) {
  return value.split("/").map(encodeURIComponent).join("/");
}

/** Events of a stream as they come; JSON set out, everything else as it is. */
async function show(response, append) {
  const type = response.headers.get("content-type") ?? "";
  if (type.startsWith("text/event-stream")) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      append(value);
    }
  }
  const text = await response.text();
  append(type.startsWith("application/json") ? JSON.stringify(JSON.parse(text), null, 2) : text);
}

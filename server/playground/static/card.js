// One model's answer: its tokens by source, the gate's trace under them, the figures, and what the other members would
// have written at a token.

import { copyFrom, el } from "./dom.js";
import { shown } from "./odds.js";
import { letterOf, quoted, styleOf } from "./sources.js";
import { Trace } from "./trace.js";

const UNSURE = Math.log(0.5); // where the server does not say what deserves a second look: less than even odds

/** What the value of a token is called, by policy; of the others it is the gate's where there is one. */
const VALUES = { confidence: "doubt" };

/** How much of a blended token the experts speak for: their probability of it, of the sum over all members. */
function shareOfExperts(support) {
  const all = Object.values(support).reduce((sum, value) => sum + Math.exp(value), 0);
  return all > 0 ? 1 - Math.exp(support.base ?? -Infinity) / all : 0;
}

export class Card {
  /**
   * @param {{id: string, title: string, joint: boolean}} model
   * @param {string[]} experts names, in the order in which styles and letters are given out
   * @param {{inspect: (card: Card, number: number) => Promise<Node>, reply: (card: Card) => void}} actions `inspect` gives
   *   what the members would have written at a token; `reply` goes on with the conversation after this answer
   */
  constructor(model, experts, actions) {
    this.model = model;
    this.experts = experts;
    this.actions = actions;
    const id = `card-${model.title.replace(/\W/g, "-")}`;
    this.state = el("p", { class: "card-state" }, "not run yet");
    this.copyButton = el("button", { type: "button", class: "small", onclick: () => copyFrom(this.copyButton, this.answer(), this.text) }, "Copy");
    this.replyButton = el("button", { type: "button", class: "small", onclick: () => actions.reply(this) }, "Reply");
    this.text = el("div", {
      class: "text",
      role: "group",
      tabIndex: 0,
      id: `${id}-text`,
      "aria-label": `Answer, ${model.title}. The arrow keys walk through its tokens, Enter compares the models there.`,
    });
    this.told = el("p", { class: "unseen", "aria-live": "polite" });
    this.empty = el("p", { class: "empty" }, "The answer will appear here.");
    this.tip = el("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.line = el("div", { class: "threshold-line", hidden: true }, (this.lineLabel = el("span")));
    this.bars = new Trace(
      (source) => styleOf(source, experts),
      (number, chosen) => (chosen ? this.#inspect(number) : this.#show(number)),
    );
    this.caption = el("p", { class: "hint trace-caption" });
    this.trace = el(
      "figure",
      { class: "trace", hidden: true, "aria-hidden": "true" },
      el("div", { class: "plot" }, this.bars.root, this.line),
      this.caption,
    );
    this.panel = el("div", { class: "position", hidden: true });
    this.figures = el("dl", { class: "figures" });
    this.root = el(
      "article",
      { class: `card${model.joint ? " joint" : ""}`, "data-model": model.id, "aria-labelledby": `${id}-title` },
      el(
        "header",
        {},
        el("h2", { id: `${id}-title` }, model.title),
        el("div", { class: "card-actions" }, this.state, this.replyButton, this.copyButton),
        el("code", {}, model.id),
      ),
      el("div", { class: "stage" }, this.empty, this.text, this.tip, this.told),
      this.error,
      this.trace,
      this.panel,
      this.figures,
    );
    this.clear();
    this.empty.hidden = false;
    this.#listen();
  }

  /** Forget the last answer. */
  clear() {
    this.tokens = [];
    this.spans = [];
    this.drawn = 0;
    this.counts = new Map();
    this.known = 0; // tokens with a value of the gate
    this.above = 0; // of these, above the threshold that is shown
    this.prompt = null;
    this.finish = null;
    this.active = -1;
    this.preview = null;
    this.sorted = null;
    clearTimeout(this.due);
    this.due = 0;
    this.text.replaceChildren();
    this.bars.show(this.tokens);
    this.figures.replaceChildren();
    for (const part of [this.error, this.trace, this.tip, this.text, this.empty, this.panel, this.copyButton, this.replyButton]) {
      part.hidden = true;
    }
    this.root.removeAttribute("data-finish");
  }

  /**
   * A run begins: its request waits for its turn.
   * @param {{policy: string|null, threshold: number|null, chat: boolean}} run what the answer is written with
   */
  begin(run) {
    this.clear();
    this.run = run;
    this.started = this.first = this.last = null;
    this.#say("queued", "running");
  }

  /** The request goes out: times count from here. */
  sent() {
    this.started = performance.now();
    this.#say("waiting", "running");
  }

  /** Tokens came; they are drawn in a moment, many at once. */
  add({ tokens, prompt }) {
    this.prompt ??= prompt;
    if (!tokens.length) return;
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      this.#say("writing", "running");
    }
    for (const token of tokens) {
      this.tokens.push(token);
      this.counts.set(token.source, (this.counts.get(token.source) ?? 0) + 1);
      if (token.p !== null) {
        this.known += 1;
        if (this.threshold !== null && token.p > this.threshold) this.above += 1;
      }
    }
    // The longer an answer is, the more a drawing costs and the less each token of it matters.
    this.due ||= setTimeout(() => this.#draw(), Math.min(16 + this.tokens.length / 40, 250));
  }

  /** The run ended: "stop", "length", or "stopped" by the user. */
  end(finish) {
    const words = { stop: "complete", length: "cut at max tokens", stopped: "stopped" };
    this.finish = finish;
    this.#draw();
    if (!this.tokens.length) {
      this.empty.textContent = finish === "stopped" ? "Stopped before the first token." : "An empty answer.";
      this.empty.hidden = false;
    }
    if (finish === "stop") this.#markEnd();
    this.#unmark();
    this.#preview();
    this.copyButton.hidden = this.answer() === "";
    this.replyButton.hidden = !this.run.chat || this.answer() === "";
    this.#say(words[finish] ?? finish, "done");
    this.root.dataset.finish = finish;
  }

  /** The run failed; what came before stays. */
  fail(error, { quiet = false } = {}) {
    this.finish = "error";
    this.#draw();
    this.error.textContent = error.code ? `${error.message} (${error.code})` : error.message;
    this.error.hidden = quiet;
    this.#say(error.status ? `error ${error.status}` : "error", "failed");
    this.root.dataset.finish = "error";
  }

  /** The text that was written, as the API's `tokens` join to it. */
  answer() {
    return this.tokens.map((token) => token.text).join("");
  }

  /** Show an answer of an earlier run. */
  restore({ run, tokens, prompt, finish, started, first, last }) {
    this.clear();
    Object.assign(this, { run, started, first, last });
    this.add({ tokens, prompt });
    Object.assign(this, { first, last });
    this.end(finish);
  }

  /** What `restore` needs. */
  record() {
    const { run, tokens, prompt, finish, started, first, last } = this;
    return { run, tokens, prompt, finish, started, first, last };
  }

  /**
   * Draw a threshold into the trace and mark the tokens whose writer it would change; null where the policy has none.
   * @param {number|null} threshold
   * @param {string|null} policy the answer's own, or nothing is marked: its values are another policy's
   */
  setThreshold(threshold, policy) {
    this.threshold = threshold;
    this.policy = policy;
    this.above = threshold === null ? 0 : this.tokens.filter(({ p }) => p !== null && p > threshold).length;
    this.line.hidden = threshold === null;
    if (threshold !== null) {
      this.line.style.setProperty("--at", threshold);
      this.lineLabel.textContent = shown(threshold);
    }
    this.#preview();
    this.#caption();
  }

  /** How many tokens would have another writer at the threshold that is shown. */
  flips() {
    const made = this.#comparable();
    if (made === null) return 0;
    const madeAbove = this.tokens.filter(({ p }) => p !== null && p > made).length;
    return Math.abs(madeAbove - this.above);
  }

  /** The threshold that the answer was written with, where the one that is shown may be compared with it. */
  #comparable() {
    if (this.threshold === null || !this.run || this.run.policy !== this.policy) return null;
    return this.run.threshold;
  }

  /** Mark what lies between the two thresholds; from one position of the slider to the next few tokens change. */
  #preview() {
    const made = this.#comparable();
    const before = this.preview ?? made;
    const after = this.threshold;
    if (made === null) {
      this.#unmark();
      return;
    }
    this.preview = after;
    if (before === after) return;
    this.sorted ??= this.tokens.map(({ p }, number) => ({ p, number })).filter(({ p }) => p !== null).sort((a, b) => a.p - b.p);
    const [low, high] = before < after ? [before, after] : [after, before];
    for (let i = lowerBound(this.sorted, low); i < this.sorted.length && this.sorted[i].p <= high; i++) {
      const { p, number } = this.sorted[i];
      this.spans[number]?.classList.toggle("flips", p > after !== p > made);
    }
  }

  #unmark() {
    for (const span of this.text.querySelectorAll(".flips")) span.classList.remove("flips");
    this.preview = null;
  }

  #say(text, state) {
    this.state.textContent = text;
    this.root.dataset.state = state;
  }

  #draw() {
    clearTimeout(this.due);
    this.due = 0;
    if (this.drawn < this.tokens.length) {
      this.text.hidden = false;
      let line = this.text.lastElementChild;
      for (; this.drawn < this.tokens.length; this.drawn++) {
        // One block for each line: the browser lays out only the one that grows.
        if (!line || this.tokens[this.drawn - 1]?.text.endsWith("\n")) this.text.append((line = el("div", { class: "line" })));
        line.append(this.#span(this.drawn));
      }
      this.sorted = null;
    }
    this.trace.hidden = !(this.model.joint && this.known);
    this.bars.draw();
    this.#figures();
    this.#caption();
  }

  #span(number) {
    const { text, source, logprob, support, check } = this.tokens[number];
    const unsure = check ?? (logprob !== null && logprob < UNSURE);
    const style = styleOf(source, this.experts);
    const blank = text.trim() === "" && text.includes("\n");
    const span = el("span", {
      class: `token ${style}${blank ? " newline" : ""}${unsure ? " unsure" : ""}`,
      // The block of a line ends with it; a line break of its own would be a second one where text is selected and copied.
      textContent: text.endsWith("\n") ? text.slice(0, -1) : text,
      "data-source": source,
      "data-p": this.tokens[number].p,
    });
    // A letter stands where an expert begins to write.
    const letter = letterOf(source, this.experts);
    if (letter && this.tokens[number - 1]?.source !== source) span.dataset.letter = letter;
    if (support !== null) span.style.setProperty("--experts", shareOfExperts(support));
    Object.assign(span, { number, token: this.tokens[number] });
    this.spans.push(span);
    return span;
  }

  #markEnd() {
    const last = this.spans.at(-1);
    if (last && this.tokens.at(-1).text === "") last.classList.add("end");
  }

  #valueName() {
    return VALUES[this.run?.policy] ?? "gate";
  }

  #caption() {
    if (!this.known) return;
    const doubt = this.#valueName() === "doubt";
    const what = doubt ? "1 − the base's top probability" : "the probability that an expert should write";
    if (this.threshold === null) {
      this.caption.textContent = `Token by token, ${what}.`;
      return;
    }
    const share = Math.round((100 * this.above) / this.known);
    const words = [`${this.above} of ${this.known} (${share} %) are above ${shown(this.threshold)}`];
    const flips = this.flips();
    if (flips) words.push(`${flips} would change writers, and what follows the first of them may read differently`);
    this.caption.textContent = `Bars: ${what}. ${words.join("; ")}.`;
  }

  #figures() {
    const total = this.tokens.length;
    const base = this.counts.get("base") ?? 0;
    const rows = [];
    const sources = ["base", ...(this.counts.has("blend") ? ["blend"] : []), ...this.experts];
    if (this.model.joint) {
      const bar = el("div", { class: "split", "aria-hidden": "true" });
      for (const source of sources) {
        const part = el("i", { class: styleOf(source, this.experts) });
        part.style.setProperty("--share", total ? (this.counts.get(source) ?? 0) / total : 0);
        bar.append(part);
      }
      rows.push(figure("Deferral rate", total ? `${((100 * (total - base)) / total).toFixed(0)} %` : "–", "rate", bar));
    }
    const detail = this.model.joint
      ? el(
          "ul",
          { class: "legend" },
          ...sources.map((source) =>
            el(
              "li",
              {},
              el("i", { class: `swatch ${styleOf(source, this.experts)}`, "aria-hidden": "true" }),
              el("b", { class: "letter" }, letterOf(source, this.experts)),
              `${this.counts.get(source) ?? 0} ${source}`,
            ),
          ),
        )
      : null;
    rows.push(figure("Tokens", String(total), "tokens", detail));
    // From the request to the last token: a browser that is busy gets the latter ones in one go, so a rate from the first
    // token on would say more of the browser than of the server.
    const speed = this.last > this.started ? (1000 * total) / (this.last - this.started) : null;
    rows.push(figure("Tokens/s", speed === null ? "–" : speed.toFixed(speed < 10 ? 1 : 0), "speed"));
    const wait = this.first === null ? null : this.first - this.started;
    rows.push(figure("First token", wait === null ? "–" : `${wait.toFixed(0)} ms`, "first"));
    this.figures.replaceChildren(...rows);
  }

  #listen() {
    const numberOf = (event) => event.target.closest?.(".token")?.number ?? -1;
    this.text.addEventListener("pointerover", (event) => this.#show(numberOf(event)));
    this.text.addEventListener("pointerleave", () => document.activeElement !== this.text && this.#show(-1));
    this.text.addEventListener("click", (event) => this.#inspect(numberOf(event)));
    this.text.addEventListener("blur", () => this.#show(-1));
    this.text.addEventListener("keydown", (event) => {
      const last = this.spans.length - 1;
      const deferred = (step) => {
        let number = this.active + step;
        while (number >= 0 && number <= last && this.tokens[number].source === "base") number += step;
        return number >= 0 && number <= last ? number : this.active;
      };
      const to = {
        ArrowRight: () => Math.min(this.active + 1, last),
        ArrowLeft: () => Math.max(this.active - 1, 0),
        ArrowDown: () => deferred(1),
        ArrowUp: () => deferred(-1),
        Home: () => 0,
        End: () => last,
      }[event.key];
      if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Enter" && this.active >= 0) this.#inspect(this.active);
      else if (to) this.#show(to(), { aloud: true });
      else return;
      event.preventDefault();
    });
  }

  /** What the members would have written at a token, in a panel under the answer. */
  async #inspect(number) {
    if (number < 0 || this.tokens[number].id === undefined) return;
    this.inspected = number;
    this.panel.hidden = false;
    this.panel.replaceChildren(el("p", { class: "hint" }, `Asking each model for ${quoted(this.tokens[number].text)} …`));
    const content = await this.actions.inspect(this, number);
    if (this.inspected === number) this.panel.replaceChildren(content);
  }

  #describe(number) {
    const { text, source, p, logprob, support, check, sure: looks, vetoed, regretted } = this.tokens[number];
    const end = number === this.tokens.length - 1 && this.finish === "stop";
    const words = text === "" ? (end ? "end of text" : "part of a character") : quoted(text);
    const value = p === null ? "the gate was not asked" : `${this.#valueName()} ${shown(p)}`;
    const sure = [
      logprob === null ? null : `written with probability ${shown(Math.exp(logprob))}`,
      ...Object.entries(looks ?? {}).map(([name, each]) => (each === null ? null : `${name} ${shown(each)} sure`)),
      vetoed ? "an expert stood back" : null,
      regretted ? "an expert's token was taken back" : null,
      check ? "deserves a second look" : null,
    ].filter(Boolean).join(", ") || null;
    const members = Object.entries(support ?? {}).map(([name, each]) => `${name} ${shown(Math.exp(each))}`).join(", ");
    return { words, source: members ? `${source} (${members})` : source, value, sure };
  }

  #show(number, { aloud = false } = {}) {
    if (number === this.active) return;
    this.spans[this.active]?.classList.remove("active");
    this.active = number;
    this.bars.mark(number);
    const span = this.spans[number];
    if (!span) {
      this.tip.hidden = true;
      return;
    }
    span.classList.add("active");
    const { words, source, value, sure } = this.#describe(number);
    if (aloud) this.told.textContent = [words, source, value, sure].filter(Boolean).join(", ");
    this.tip.replaceChildren(
      el("b", {}, words),
      el("span", {}, el("i", { class: `swatch ${styleOf(source, this.experts)}` }), source),
      el("span", { class: "number" }, value),
      ...(sure ? [el("span", { class: "number" }, sure.replace("written with probability", "p"))] : []),
    );
    this.tip.hidden = false;
    const stage = this.tip.parentElement.getBoundingClientRect();
    const box = [...span.getClientRects()].at(-1) ?? span.getBoundingClientRect();
    const room = stage.width - this.tip.offsetWidth;
    const left = Math.max(0, Math.min(box.left - stage.left + box.width / 2 - this.tip.offsetWidth / 2, room));
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${box.top - stage.top - this.tip.offsetHeight - 6}px`;
  }
}

/** The first index whose value is above a bound, in a list sorted by it. */
function lowerBound(sorted, bound) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle].p <= bound) low = middle + 1;
    else high = middle;
  }
  return low;
}

function figure(name, value, key, more = null) {
  return el("div", { "data-figure": key }, el("dt", {}, name), el("dd", {}, el("b", {}, value), more));
}

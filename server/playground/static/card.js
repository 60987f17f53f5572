// One model's answer: its tokens by source, the gate's trace under them, and the figures.

import { el } from "./dom.js";

const STYLES = 4; // of experts, in style.css; a fifth expert looks like the first again, and is still named
const SHOWN = new Map([
  ["\n", "↵\n"],
  ["", "∎"],
]);

/** How a token is spoken of: quoted, with what cannot be seen made visible. */
function quoted(text) {
  if (text === "") return "end of text, or part of a character";
  return `“${text.replaceAll("\n", "↵").replaceAll(" ", "␣")}”`;
}

/** How much of a blended token the experts speak for: their probability of it, of the sum over all members. */
function shareOfExperts(support) {
  const all = Object.values(support).reduce((sum, value) => sum + Math.exp(value), 0);
  return all > 0 ? 1 - Math.exp(support.base ?? -Infinity) / all : 0;
}

/** Which of the styles a source has: "base", "blend", or "expert-1" and so on. */
export function styleOf(source, experts) {
  if (source === "blend") return source;
  return source === "base" ? "base" : `expert-${(Math.max(experts.indexOf(source), 0) % STYLES) + 1}`;
}

export class Card {
  /**
   * @param {{id: string, title: string, joint: boolean}} model
   * @param {string[]} experts names, in the order in which styles are given out
   */
  constructor(model, experts) {
    this.model = model;
    this.experts = experts;
    this.tokens = [];
    this.spans = [];
    this.columns = [];
    this.active = -1;
    this.threshold = null;
    const id = `card-${model.title.replace(/\W/g, "-")}`;
    this.state = el("p", { class: "card-state" }, "not run yet");
    this.text = el("div", {
      class: "text",
      role: "listbox",
      tabIndex: 0,
      id: `${id}-text`,
      "aria-label": `Tokens of the answer, ${model.title}`,
    });
    this.empty = el("p", { class: "empty" }, "The answer will stand here.");
    this.tip = el("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.line = el("div", { class: "threshold-line", hidden: true }, (this.lineLabel = el("span")));
    this.strip = el("div", { class: "strip" });
    this.caption = el("p", { class: "hint trace-caption" });
    this.trace = el(
      "figure",
      { class: "trace", hidden: true, "aria-hidden": "true" },
      el("div", { class: "plot" }, this.strip, this.line),
      this.caption,
    );
    this.figures = el("dl", { class: "figures" });
    this.root = el(
      "article",
      { class: `card${model.joint ? " joint" : ""}`, "data-model": model.id, "aria-labelledby": `${id}-title` },
      el(
        "header",
        {},
        el("h2", { id: `${id}-title` }, model.title),
        el("code", {}, model.id),
        this.state,
      ),
      el("div", { class: "stage" }, this.empty, this.text, this.tip),
      this.error,
      this.trace,
      this.figures,
    );
    this.text.hidden = true;
    this.#listen();
  }

  /** Forget the last answer. */
  clear() {
    this.tokens = [];
    this.spans = [];
    this.columns = [];
    this.active = -1;
    this.text.replaceChildren();
    this.text.removeAttribute("aria-activedescendant");
    this.strip.replaceChildren();
    this.figures.replaceChildren();
    this.error.hidden = true;
    this.trace.hidden = true;
    this.tip.hidden = true;
    this.text.hidden = true;
    this.empty.hidden = true;
    this.root.removeAttribute("data-finish");
  }

  /** A run begins. */
  begin() {
    this.clear();
    this.started = performance.now();
    this.first = null;
    this.last = null;
    this.#say("waiting", "running");
  }

  /** Tokens came. */
  add(tokens) {
    if (!tokens.length) return;
    const now = performance.now();
    if (this.first === null) {
      this.first = now;
      this.#say("writing", "running");
      this.text.hidden = false;
    }
    this.last = now;
    const spans = document.createDocumentFragment();
    const columns = document.createDocumentFragment();
    for (const token of tokens) {
      const number = this.tokens.push(token) - 1;
      spans.append(this.#span(token, number));
      if (this.model.joint) columns.append(this.#column(token, number));
    }
    this.text.append(spans);
    this.strip.append(columns);
    this.trace.hidden = !this.tokens.some((token) => token.p !== null);
    this.#figures();
    this.#caption();
  }

  /** The run ended: "stop", "length", or "stopped" by the user. */
  end(finish) {
    const words = { stop: "complete", length: "cut at max tokens", stopped: "stopped" };
    this.root.dataset.finish = finish;
    if (!this.tokens.length) {
      this.empty.textContent = finish === "stopped" ? "Stopped before the first token." : "An empty answer.";
      this.empty.hidden = false;
    }
    this.#say(words[finish] ?? finish, "done");
    this.#figures();
  }

  /** The run failed. */
  fail(error) {
    this.root.dataset.finish = "error";
    this.error.textContent = error.code ? `${error.message} (${error.code})` : error.message;
    this.error.hidden = false;
    this.#say(error.status ? `error ${error.status}` : "error", "failed");
  }

  /** Draw the threshold into the trace; null where the policy has none. */
  setThreshold(threshold) {
    this.threshold = threshold;
    this.line.hidden = threshold === null;
    if (threshold !== null) {
      this.line.style.setProperty("--at", threshold);
      this.lineLabel.textContent = threshold.toFixed(2);
    }
    for (const [number, column] of this.columns.entries()) {
      column.classList.toggle("above", threshold !== null && this.tokens[number].p > threshold);
    }
    this.#caption();
  }

  /** Who wrote how much. */
  counts() {
    const counts = new Map();
    for (const { source } of this.tokens) counts.set(source, (counts.get(source) ?? 0) + 1);
    return counts;
  }

  #say(text, state) {
    this.state.textContent = text;
    this.root.dataset.state = state;
  }

  #span(token, number) {
    const deferral = token.p === null ? "" : `, gate ${token.p.toFixed(3)}`;
    const members = Object.entries(token.support ?? {});
    const support = members.map(([name, value]) => `, ${name} ${Math.exp(value).toPrecision(2)}`).join("");
    const span = el(
      "span",
      {
        class: `token ${styleOf(token.source, this.experts)}${token.text === "" ? " blank" : ""}`,
        role: "option",
        id: `${this.text.id}-${number}`,
        "data-source": token.source,
        "data-p": token.p,
        "aria-label": `${quoted(token.text)}, ${token.source}${support}${deferral}`,
        "aria-selected": "false",
      },
      SHOWN.get(token.text) ?? token.text,
    );
    if (token.support) span.style.setProperty("--experts", shareOfExperts(token.support));
    this.spans.push(span);
    return span;
  }

  #column(token, number) {
    const column = el("i", {
      class: `column ${styleOf(token.source, this.experts)}${token.p === null ? " none" : ""}`,
      "data-number": number,
    });
    column.style.setProperty("--p", token.p ?? 0);
    column.classList.toggle("above", this.threshold !== null && token.p > this.threshold);
    this.columns.push(column);
    return column;
  }

  #caption() {
    const known = this.tokens.filter((token) => token.p !== null);
    if (!known.length) return;
    if (this.threshold === null) {
      this.caption.textContent = "The probability, token by token, that an expert should write.";
      return;
    }
    const above = known.filter((token) => token.p > this.threshold).length;
    this.caption.textContent =
      `${above} of ${known.length} probabilities are above ${this.threshold.toFixed(2)}. Point at a token or a bar, or use ← →.`;
  }

  #figures() {
    const counts = this.counts();
    const total = this.tokens.length;
    const experts = total - (counts.get("base") ?? 0);
    const rows = [];
    if (this.model.joint) {
      const bar = el("div", { class: "split", "aria-hidden": "true" });
      for (const source of this.#sources(counts)) {
        const part = el("i", { class: styleOf(source, this.experts) });
        part.style.setProperty("--share", total ? (counts.get(source) ?? 0) / total : 0);
        bar.append(part);
      }
      rows.push(figure("Deferral rate", total ? `${((100 * experts) / total).toFixed(0)} %` : "–", "rate", bar));
    }
    const detail = this.model.joint
      ? el(
          "ul",
          { class: "legend" },
          ...this.#sources(counts).map((source) =>
            el(
              "li",
              {},
              el("i", { class: `swatch ${styleOf(source, this.experts)}`, "aria-hidden": "true" }),
              `${counts.get(source) ?? 0} ${source}`,
            ),
          ),
        )
      : null;
    rows.push(figure("Tokens", String(total), "tokens", detail));
    const speed = this.#speed();
    rows.push(figure("Tokens/s", speed === null ? "–" : speed.toFixed(speed < 10 ? 1 : 0), "speed"));
    const wait = this.first === null ? null : this.first - this.started;
    rows.push(figure("First token", wait === null ? "–" : `${wait.toFixed(0)} ms`, "first"));
    this.figures.replaceChildren(...rows);
  }

  /** Who may have written: the members, and all of them together where something was blended. */
  #sources(counts) {
    return ["base", ...this.experts, ...(counts.has("blend") ? ["blend"] : [])];
  }

  /** Tokens a second, from the request to the last token: a browser that is busy gets the latter ones in one go, so a
   * rate from the first token on would say more of the browser than of the server. */
  #speed() {
    return this.last > this.started ? (1000 * this.tokens.length) / (this.last - this.started) : null;
  }

  #listen() {
    const numberOf = (event) => {
      const target = event.target.closest?.(".token, .column");
      if (!target) return -1;
      return target.dataset.number ? Number(target.dataset.number) : this.spans.indexOf(target);
    };
    for (const part of [this.text, this.strip]) {
      part.addEventListener("pointerover", (event) => this.#show(numberOf(event)));
      part.addEventListener("pointerleave", () => document.activeElement !== this.text && this.#show(-1));
      part.addEventListener("click", (event) => this.#show(numberOf(event)));
    }
    this.text.addEventListener("focus", () => {
      if (this.active < 0 && this.spans.length && this.text.matches(":focus-visible")) this.#show(0);
    });
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
      if (!to || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.#show(to());
    });
  }

  /** Scroll the strip, and nothing else, to where a column can be seen. */
  #reveal(column) {
    if (!column) return;
    const strip = this.strip.getBoundingClientRect();
    const { left, right } = column.getBoundingClientRect();
    if (left < strip.left || right > strip.right) this.strip.scrollLeft += left - (strip.left + strip.width / 2);
  }

  #show(number) {
    if (number === this.active) return;
    for (const list of [this.spans, this.columns]) list[this.active]?.classList.remove("active");
    this.spans[this.active]?.setAttribute("aria-selected", "false");
    this.active = number;
    const span = this.spans[number];
    if (!span) {
      this.tip.hidden = true;
      this.text.removeAttribute("aria-activedescendant");
      return;
    }
    span.classList.add("active");
    span.setAttribute("aria-selected", "true");
    this.columns[number]?.classList.add("active");
    this.#reveal(this.columns[number]);
    this.text.setAttribute("aria-activedescendant", span.id);
    const { text, source, p } = this.tokens[number];
    this.tip.replaceChildren(
      el("b", {}, quoted(text)),
      el("span", {}, el("i", { class: `swatch ${styleOf(source, this.experts)}` }), source),
      el("span", { class: "number" }, p === null ? "the gate was not asked" : `gate ${p.toFixed(3)}`),
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

function figure(name, value, key, more = null) {
  return el("div", { "data-figure": key }, el("dt", {}, name), el("dd", {}, el("b", {}, value), more));
}

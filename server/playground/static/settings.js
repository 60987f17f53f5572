// The form as a value: what a run is made with. It becomes requests, and goes into share links and the history.

import { byId, el, valueOf } from "./dom.js";
import { shareAt, sliderAt, shown, SLIDER, thresholdAt, thresholdFor } from "./odds.js";

const POLICIES = {
  threshold: { label: "The gate, by threshold", hint: "Experts are asked where the gate's probability is above the threshold." },
  sample: { label: "The gate, by drawing", hint: "Experts are asked with the gate's probability." },
  confidence: {
    label: "The base's confidence",
    hint: "Experts are asked where 1 − the base's top probability is above the threshold. Needs no gate.",
  },
  random: { label: "Chance", hint: "Experts are asked with a fixed probability: what a gate has to beat." },
  always: { label: "Always the expert", hint: "Experts are asked at every token." },
  never: { label: "Never the expert", hint: "The base writes every token." },
};

/** Policies that a threshold belongs to. */
const WITH_THRESHOLD = ["threshold", "confidence"];

const FIELDS = {
  maxTokens: "max-tokens", temperature: "temperature", topP: "top-p", seed: "seed", maxExpertTokens: "max-expert-tokens",
};

export class Settings {
  /** @param {{changed: () => void}} actions */
  constructor({ changed }) {
    this.changed = changed;
    this.served = null;
    this.turns = []; // of a chat, before the prompt: {role, content}
    this.threshold = null; // the user's; null: the server's default
    this.share = null; // of the tokens that experts should write, in the threshold's place
    this.form = byId("form");
    Object.assign(byId("threshold"), SLIDER);
    byId("threshold").addEventListener("input", () => {
      this.share = null;
      this.threshold = thresholdAt(Number(byId("threshold").value));
    });
    byId("share-of-tokens").addEventListener("input", () => {
      const share = valueOf(byId("share-of-tokens"));
      if (share === null || !(share >= 0 && share <= 100)) return;
      this.threshold = null;
      this.share = share / 100;
    });
    byId("threshold-reset").addEventListener("click", () => {
      this.takeThreshold(null);
      byId("threshold").focus();
    });
  }

  /** What the server serves, once it is known: which policies there are, and the experts. */
  serve(served) {
    this.served = served;
    const { collaboration } = served;
    const policy = byId("policy");
    const chosen = policy.value;
    policy.replaceChildren(
      ...Object.entries(POLICIES).map(([name, { label }]) =>
        el("option", { value: name, disabled: !collaboration.policies.includes(name) }, label),
      ),
    );
    policy.value = collaboration.policies.includes(chosen) ? chosen : collaboration.policy ?? collaboration.policies[0];
    const blend = byId("blend");
    const blended = blend.value;
    blend.replaceChildren(
      el("option", { value: "" }, "The expert's own token"),
      ...collaboration.blends.map((name) => el("option", { value: name }, `Blend: ${name}`)),
    );
    blend.value = collaboration.blends.includes(blended) ? blended : "";
    byId("blend-field").hidden = !collaboration.blends.length;
    const experts = byId("experts");
    if (experts.querySelectorAll("input").length !== collaboration.experts.length) {
      experts.replaceChildren(
        experts.querySelector("legend"),
        ...collaboration.experts.map((name) =>
          el("label", { class: "check" }, el("input", { type: "checkbox", checked: true, value: name }), name),
        ),
      );
    }
    experts.hidden = collaboration.experts.length < 2;
    this.show();
  }

  /** "text" to continue, or a "chat" message. */
  get kind() {
    return this.form.elements.kind.value;
  }

  get policy() {
    return byId("policy").value;
  }

  /** The threshold in force: the user's, or the server's default; null where the policy has none. */
  get effectiveThreshold() {
    if (!WITH_THRESHOLD.includes(this.policy)) return null;
    if (this.#shareInForce !== null) return thresholdFor(this.share, this.#curve);
    return this.threshold ?? this.#default();
  }

  get #curve() {
    return (this.policy === "threshold" && this.served?.collaboration.curve) || null;
  }

  get #shareInForce() {
    return this.#curve && this.#experts() === null ? this.share : null;
  }

  #default() {
    return this.served?.collaboration.thresholds[this.policy] ?? 0.5;
  }

  /** Take a threshold as the user's own, or null for the default. */
  takeThreshold(threshold) {
    this.share = null;
    this.threshold = threshold;
    this.show();
    this.changed();
  }

  /** Bring the form's texts in line with its values. */
  show() {
    byId("policy-hint").textContent = POLICIES[this.policy]?.hint ?? "";
    const at = this.effectiveThreshold;
    byId("threshold-field").hidden = at === null;
    byId("rate-field").hidden = this.policy !== "random";
    if (at !== null) {
      const own = this.threshold !== null || this.#shareInForce !== null;
      byId("threshold").value = sliderAt(at);
      byId("threshold").setAttribute("aria-valuetext", shown(at));
      const source = this.policy === "threshold" && this.served?.collaboration.gate ? "the gate's" : "the default";
      byId("threshold-value").textContent = own ? shown(at) : `${shown(at)}, ${source}`;
      byId("threshold-reset").textContent = `use ${source}`;
      byId("threshold-reset").hidden = !own;
    }
    const curve = this.#curve;
    byId("share-field").hidden = at === null || !curve || this.#experts() !== null;
    if (curve && document.activeElement !== byId("share-of-tokens")) {
      byId("share-of-tokens").value = String(Math.round(100 * (this.#shareInForce ?? shareAt(at, curve))));
    }
    byId("rate-value").textContent = Number(byId("rate").value).toFixed(2);
    byId("system-field").hidden = this.kind !== "chat";
    this.#showTurns();
  }

  #showTurns() {
    const list = byId("turns");
    list.hidden = this.kind !== "chat" || !this.turns.length;
    list.replaceChildren(
      ...this.turns.map(({ role, content }) => el("li", { class: `turn ${role}` }, el("b", {}, role), el("span", {}, content))),
      ...(this.turns.length
        ? [el("li", {}, el("button", { type: "button", class: "link", onclick: () => this.takeTurns([]) }, "Begin a new conversation"))]
        : []),
    );
  }

  /** Take the turns of a conversation that the prompt goes on with. */
  takeTurns(turns) {
    this.turns = turns;
    this.show();
    this.changed();
  }

  #experts() {
    const boxes = [...byId("experts").querySelectorAll("input")];
    const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
    return chosen.length === boxes.length ? null : chosen;
  }

  /** The request's `collaboration`, but for `report`: what differs from the server's defaults. */
  collaboration() {
    const { collaboration } = this.served;
    const chosen = {};
    // A blend may have a policy and a threshold of its own, where the request names none: what is shown here counts.
    if (this.policy !== collaboration.policy || byId("blend").value) chosen.policy = this.policy;
    if (this.#shareInForce !== null) chosen.share = this.share;
    else if (this.threshold !== null && this.effectiveThreshold !== null) chosen.threshold = this.threshold;
    if (this.policy === "random") chosen.rate = Number(byId("rate").value);
    if (byId("blend").value) chosen.blend = byId("blend").value;
    const most = valueOf(byId("max-expert-tokens"));
    if (most !== null) chosen.max_expert_tokens = most;
    const experts = this.#experts();
    if (experts !== null) chosen.experts = experts;
    return chosen;
  }

  /** The messages of a chat. */
  messages() {
    const system = byId("system").value;
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...this.turns,
      { role: "user", content: byId("prompt").value },
    ];
  }

  /**
   * The body of a request.
   * @param {{id: string, joint: boolean}} model
   */
  request(model) {
    const body = {
      model: model.id,
      ...(this.kind === "chat" ? { messages: this.messages() } : { prompt: byId("prompt").value }),
      max_tokens: valueOf(byId("max-tokens")),
      temperature: valueOf(byId("temperature")),
    };
    for (const [field, id] of [["top_p", "top-p"], ["seed", "seed"]]) {
      const value = valueOf(byId(id));
      if (value !== null) body[field] = value;
    }
    const stop = this.#stop();
    if (stop.length) body.stop = stop;
    return { ...body, stream: true, collaboration: { ...(model.joint ? this.collaboration() : {}), report: true } };
  }

  /** One stop string for each line; \n in a line is a line break. */
  #stop() {
    return byId("stops").value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  }

  /** Everything that a share link carries and a run of the history needs. Never the key. */
  read() {
    const values = Object.fromEntries(Object.entries(FIELDS).map(([name, id]) => [name, byId(id).value]));
    return {
      ...values,
      kind: this.kind,
      prompt: byId("prompt").value,
      system: byId("system").value,
      turns: this.turns,
      stops: byId("stops").value,
      policy: this.policy,
      blend: byId("blend").value,
      threshold: this.threshold,
      share: this.share,
      rate: byId("rate").value,
      experts: this.#experts(),
    };
  }

  /** Fill the form. What is missing or of another server (a policy, an expert) is left as it is. */
  write(values) {
    const text = (id, value) => typeof value === "string" && (byId(id).value = value);
    for (const [name, id] of Object.entries(FIELDS)) text(id, values[name]);
    for (const id of ["prompt", "system", "stops", "rate"]) text(id, values[id]);
    if (["text", "chat"].includes(values.kind)) this.form.elements.kind.value = values.kind;
    const option = [...byId("policy").options].find((each) => each.value === values.policy);
    if (option && !option.disabled) byId("policy").value = values.policy;
    if ([...byId("blend").options].some((each) => each.value === values.blend)) byId("blend").value = values.blend;
    this.threshold = typeof values.threshold === "number" && values.threshold >= 0 && values.threshold <= 1 ? values.threshold : null;
    this.share = typeof values.share === "number" && values.share >= 0 && values.share <= 1 ? values.share : null;
    for (const box of byId("experts").querySelectorAll("input")) {
      box.checked = !Array.isArray(values.experts) || values.experts.includes(box.value);
    }
    const turns = Array.isArray(values.turns) ? values.turns : [];
    this.turns = turns
      .filter((turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string")
      .map(({ role, content }) => ({ role, content }));
    this.show();
    this.changed();
  }
}

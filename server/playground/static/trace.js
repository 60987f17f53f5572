// The gate's probabilities, one bar for each token. A canvas that draws the bars in view: thousands of elements would make
// every token and every step of the slider slow.

import { el } from "./dom.js";

const HEIGHT = 72; // CSS pixels, as the threshold's line in style.css has it
const NARROWEST = 4;
const WIDEST = 22;

export class Trace {
  /**
   * @param {(source: string) => string} styleOf the name of a source's style
   * @param {(number: number) => void} point called with the number of the token that is pointed at, -1 for none
   */
  constructor(styleOf, point) {
    this.styleOf = styleOf;
    this.tokens = [];
    this.active = -1;
    this.canvas = el("canvas", { height: HEIGHT });
    this.room = el("div", { class: "room" }, this.canvas);
    this.root = el("div", { class: "strip" }, this.room);
    this.due = 0;
    this.root.addEventListener("scroll", () => this.draw());
    this.root.addEventListener("pointermove", (event) => point(this.#at(event)));
    this.root.addEventListener("pointerleave", () => point(-1));
    this.root.addEventListener("click", (event) => point(this.#at(event), true));
    new ResizeObserver(() => this.draw()).observe(this.root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Show these tokens; the list may grow and is looked at again at every drawing. */
  show(tokens) {
    this.tokens = tokens;
    this.draw();
  }

  /** Mark a token's bar, and scroll to where it can be seen. */
  mark(number) {
    this.active = number;
    if (number >= 0) {
      const width = this.width();
      const left = number * width;
      const { scrollLeft, clientWidth } = this.root;
      if (left < scrollLeft || left + width > scrollLeft + clientWidth) this.root.scrollLeft = left - clientWidth / 2;
    }
    this.draw();
  }

  /** Pixels per bar. */
  width() {
    return Math.min(Math.max(this.root.clientWidth / Math.max(this.tokens.length, 1), NARROWEST), WIDEST);
  }

  /** Draw at the browser's next frame. */
  draw() {
    this.due ||= requestAnimationFrame(() => {
      this.due = 0;
      this.#draw();
    });
  }

  #at(event) {
    const x = event.clientX - this.room.getBoundingClientRect().left;
    const number = Math.floor(x / this.width());
    return number >= 0 && number < this.tokens.length ? number : -1;
  }

  #draw() {
    const { clientWidth, scrollLeft } = this.root;
    if (!clientWidth) return;
    const width = this.width();
    this.room.style.width = `${Math.max(this.tokens.length * width, 1)}px`;
    const scale = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(clientWidth * scale)) this.canvas.width = Math.round(clientWidth * scale);
    if (this.canvas.height !== Math.round(HEIGHT * scale)) this.canvas.height = Math.round(HEIGHT * scale);
    this.canvas.style.width = `${clientWidth}px`;
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, clientWidth, HEIGHT);
    const colours = getComputedStyle(this.root);
    const patterns = new Map();
    const first = Math.floor(scrollLeft / width);
    const last = Math.min(Math.ceil((scrollLeft + clientWidth) / width), this.tokens.length);
    for (let number = first; number < last; number++) {
      const { p, source } = this.tokens[number];
      const left = number * width - scrollLeft;
      if (number === this.active) {
        context.fillStyle = colours.getPropertyValue("--ink");
        context.globalAlpha = 0.18;
        context.fillRect(left, 0, width, HEIGHT);
        context.globalAlpha = 1;
      }
      const style = this.styleOf(source);
      if (!patterns.has(style)) patterns.set(style, fill(context, style, colours));
      context.fillStyle = patterns.get(style);
      const height = p === null ? 2 : Math.max(2, p * HEIGHT);
      context.globalAlpha = p === null ? 0.4 : 1;
      context.fillRect(left + 0.5, HEIGHT - height, Math.max(width - 1.5, 1.5), height);
      context.globalAlpha = 1;
    }
  }
}

/** The base is plain, experts are hatched, each in its own direction. */
function fill(context, style, colours) {
  if (!style.startsWith("expert")) return colours.getPropertyValue(`--${style}`) || colours.getPropertyValue("--base");
  const kind = Number(style.split("-")[1]);
  const colour = colours.getPropertyValue(`--e${kind}`);
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.fillStyle = colour;
  pen.globalAlpha = 0.55;
  pen.fillRect(0, 0, 8, 8);
  pen.globalAlpha = 1;
  pen.strokeStyle = colour;
  pen.lineWidth = 2;
  pen.beginPath();
  const strokes = [
    [[-2, 2, 2, -2], [-2, 10, 10, -2], [6, 10, 10, 6]],
    [[-2, 6, 2, 10], [-2, -2, 10, 10], [6, -2, 10, 2]],
    [[0, 4, 8, 4]],
    [[4, 0, 4, 8]],
  ][kind - 1];
  for (const [fromX, fromY, toX, toY] of strokes) {
    pen.moveTo(fromX, fromY);
    pen.lineTo(toX, toY);
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

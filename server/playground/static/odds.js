// Thresholds on a scale of log-odds: gates of real models put most of their probabilities near 0 and 1, where a linear
// slider would have two useful positions.

const EDGE = 7; // log-odds at the slider's ends: probabilities of 0.0009 and 0.9991
const STEPS = 200;

/** The slider's range; its ends stand for exactly 0 and 1. */
export const SLIDER = { min: 0, max: STEPS, step: 1 };

/** The threshold at a position of the slider. */
export function thresholdAt(position) {
  if (position <= 0) return 0;
  if (position >= STEPS) return 1;
  return round(1 / (1 + Math.exp(-EDGE * ((2 * position) / STEPS - 1))));
}

/** The position of the slider that is nearest to a threshold. */
export function sliderAt(threshold) {
  if (threshold <= 0) return 0;
  if (threshold >= 1) return STEPS;
  const at = (Math.log(threshold / (1 - threshold)) / EDGE + 1) * (STEPS / 2);
  return Math.round(Math.min(Math.max(at, 1), STEPS - 1));
}

/** A probability with the digits that matter: more of them near 0 and 1. */
export function shown(p) {
  if (p === 0 || p === 1) return p.toFixed(2);
  if (p < 5e-5) return p.toExponential(0);
  if (1 - p < 5e-5) return `1 − ${(1 - p).toExponential(0)}`;
  return p < 0.05 || p > 0.95 ? p.toFixed(4) : p.toFixed(2);
}

/**
 * The threshold at which experts write about so many of the tokens; as the server's `collaboration.share`, between two
 * points of the curve by log-odds.
 * @param {number} share
 * @param {{threshold: number, share: number}[]} curve
 */
export function thresholdFor(share, curve) {
  if (share <= 0) return 1;
  if (share >= 1) return 0;
  const [below, above] = around(share, curve, "share");
  const part = (share - below.share) / (above.share - below.share);
  return 1 / (1 + Math.exp(-((1 - part) * odds(below.threshold) + part * odds(above.threshold))));
}

/** The share of tokens that experts write at a threshold, by the same curve. */
export function shareAt(threshold, curve) {
  const [above, below] = around(threshold, curve, "threshold");
  const [low, high] = [odds(above.threshold), odds(below.threshold)];
  const part = high > low ? (odds(threshold) - low) / (high - low) : 0;
  return (1 - part) * above.share + part * below.share;
}

/** The two points that a value lies between. */
function around(value, curve, name) {
  const points = [{ threshold: 1, share: 0 }, ...curve, { threshold: 0, share: 1 }];
  points.sort((a, b) => a[name] - b[name] || (name === "share" ? b.threshold - a.threshold : b.share - a.share));
  const next = points.findIndex((point) => point[name] > value);
  return next < 0 ? [points.at(-1), points.at(-1)] : [points[Math.max(next - 1, 0)], points[next]];
}

function odds(p) {
  const inside = Math.min(Math.max(p, 1e-9), 1 - 1e-9);
  return Math.log(inside / (1 - inside));
}

function round(p) {
  return Number(p.toFixed(p < 0.05 || p > 0.95 ? 4 : 2));
}

/**
 * Thresholds at which the share of deferred tokens is about 0, a quarter, a half, three quarters and 1, by the
 * probabilities of an answer; fewer where several would defer the same tokens.
 * @param {number[]} probabilities
 */
export function spread(probabilities) {
  const sorted = [...probabilities].sort((a, b) => b - a);
  if (!sorted.length) return [0.9, 0.7, 0.5, 0.3, 0.1];
  const between = (k) => (k <= 0 ? 1 : k >= sorted.length ? 0 : (sorted[k - 1] + sorted[k]) / 2);
  const found = [0, 0.25, 0.5, 0.75, 1].map((share) => between(Math.round(share * sorted.length)));
  return [...new Set(found)];
}

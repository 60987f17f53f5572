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

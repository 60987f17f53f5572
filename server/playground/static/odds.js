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
 * The threshold at which experts write about so many of the tokens; as the server's `collaboration.share`: log-odds of
 * thresholds and shares, in straight lines from point to point of the curve, of which the outer two go on.
 * @param {number} share
 * @param {{threshold: number, share: number}[]} curve
 */
export function thresholdFor(share, curve) {
  if (share <= 0) return 1;
  if (share >= 1) return 0;
  return probability(along(odds(share), line(curve).map(({ threshold, share }) => [share, threshold])));
}

/** The share of tokens that experts write at a threshold, by the same curve. */
export function shareAt(threshold, curve) {
  if (threshold >= 1) return 0;
  if (threshold <= 0) return 1;
  const points = line(curve).map(({ threshold, share }) => [-threshold, share]);
  return probability(along(-odds(threshold), points));
}

const LEAST = 1e-3; // a share measured to be nearer to 0 or 1 counts as this
const FAR = 100; // log-odds beyond the points, where the outer lines are taken to end

/** The curve's points in log-odds, the share never falling, and an end of either outer line. */
function line(curve) {
  const inside = curve.filter(({ threshold }) => threshold > 0 && threshold < 1);
  let greatest = LEAST;
  const points = inside
    .toSorted((a, b) => b.threshold - a.threshold || b.share - a.share)
    .map(({ threshold, share }) => {
      greatest = Math.max(greatest, Math.min(share, 1 - LEAST));
      return { threshold: odds(threshold), share: odds(greatest) };
    });
  if (!points.length) points.push({ threshold: 0, share: 0 });
  return [beyond(points, -FAR), ...points, beyond(points.toReversed(), FAR)];
}

/** A point so far before the first, on the line to the first other one whose odds differ by half or more. */
function beyond(points, far) {
  const [first] = points;
  const other = points.find((point) => Math.abs(point.share - first.share) >= Math.log(1.5));
  const slope = other ? (other.threshold - first.threshold) / (other.share - first.share) : -1;
  return { threshold: first.threshold + slope * far, share: first.share + far };
}

/** The value at x of the lines through points [x, y] whose x rises. */
function along(x, points) {
  const found = points.findIndex(([at]) => at > x);
  const above = found < 0 ? points.length - 1 : Math.max(found, 1);
  const [[x1, y1], [x2, y2]] = [points[above - 1], points[above]];
  return x2 > x1 ? y1 + ((x - x1) / (x2 - x1)) * (y2 - y1) : y1;
}

function odds(p) {
  return Math.log(p) - Math.log1p(-p);
}

function probability(logOdds) {
  return 1 / (1 + Math.exp(-logOdds));
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

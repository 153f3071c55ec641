// A target that was drawn, and networks that learn it: the losses of objectives.py and consistency.py with the exact
// velocity, AdamW and the average of training.py. tests/live/test_learn.py holds a whole run against torch.
import * as math from "./compute.js";

export const SIZES = [16, 64, 64, 64, 64, 2];
export const STEPS = 4000;
const EULERIAN = { eulerian: 1, semigroup: 0, mixed: 0.5 }; // the share among rows r < t; the rest is semigroup
const DELTA = 2e-3, STEP = 1 / 16, RATE = 1e-2, WARMUP = 50, BETAS = [0.9, 0.999];
const SPACING = 0.08, SIGMA = 0.06, MOST = 120; // of the components along a drawn line

/** The mixture along strokes [x, y, x, y, ...]: components at even distances; null if that is fewer than four. */
export function drawn(strokes) {
  const lengths = strokes.map((line) => line.slice(2).reduce((sum, _, k) => (k % 2 ? sum : sum + Math.hypot(line[k + 2] - line[k], line[k + 3] - line[k + 1])), 0));
  const spacing = Math.max(SPACING, lengths.reduce((a, b) => a + b, 0) / MOST), means = [];
  strokes.forEach((line) => {
    let next = 0, gone = 0; // of the next component; up to this piece
    for (let k = 0; k + 1 < line.length; k += 2) {
      const [x, y] = [line[k], line[k + 1]], [to, up] = k + 3 < line.length ? [line[k + 2], line[k + 3]] : [x, y], length = Math.hypot(to - x, up - y);
      for (; next < gone + length || next === 0; next += spacing) means.push(x + ((next - gone) / (length || 1)) * (to - x), y + ((next - gone) / (length || 1)) * (up - y));
      gone += length;
    }
  });
  return means.length < 8 ? null : { means: Float64Array.from(means), sigma: SIGMA };
}

/** One network, its optimiser and its average. seed: of the start, the same as networks/mlp.py's, and of the batches. */
export class Learner {
  constructor({ mixture, method, seed }) {
    const generator = new math.Generator(seed), size = math.countOf(SIZES), start = new Float64Array(size);
    for (let k = 0, at = 0; k + 1 < SIZES.length; at += (SIZES[k] + 1) * SIZES[k + 1], k++)
      start.set(generator.randn(SIZES[k] * SIZES[k + 1]).map((value) => value / Math.sqrt(SIZES[k])), at);
    Object.assign(this, { mixture, method, generator, steps: 0, seconds: 0, loss: NaN, weights: start, average: start.slice() });
    Object.assign(this, { first: new Float64Array(size), second: new Float64Array(size) });
    [this.network, this.averaged] = [0, 1].map(() => math.makeNetwork(start, SIZES));
  }

  /** As batches() of batch.py with draw_pairs(): x, eps (n 2); t, r, split, objective_draw (n). */
  batch(n = 128) {
    const { generator, mixture: { means, sigma }, method } = this, [diagonal, end] = method === "consistency" ? [1, 0] : [0.5, 0.25];
    const [which, one, other, split, jitter] = Array.from({ length: 5 }, () => generator.rand(n)), K = means.length / 2;
    const x = generator.randn(2 * n).map((value, i) => means[2 * Math.floor(which[i >> 1] * K) + (i & 1)] + sigma * value);
    const place = jitter.map((value, k) => (k + value) / n), t = new Float64Array(n), r = new Float64Array(n), edges = [0, diagonal, diagonal + end, 1];
    const objective_draw = place.map((value, k) => {
      const kind = value < edges[1] ? 0 : value < edges[2] ? 1 : 2;
      t[k] = kind ? Math.max(one[k], other[k]) : one[k];
      r[k] = [t[k], 0, Math.min(one[k], other[k])][kind];
      return (value - edges[kind]) / (edges[kind + 1] - edges[kind]);
    });
    return { x, eps: generator.randn(2 * n), t, r, split, objective_draw };
  }

  /** What u(z, t, r) is regressed on (n 2), for z (n 2) with the exact velocity v. */
  target(z, v, { t, r, split, objective_draw }) {
    const n = t.length, out = v.slice(), rowsOf = (holds) => [...t.keys()].filter(holds);
    const moved = (rows, from, to, speed) => Float64Array.from({ length: 2 * rows.length }, (_, i) => from[i] - (t[rows[i >> 1]] - to[i >> 1]) * speed[i]);
    const at = (rows, values) => Float64Array.from({ length: 2 * rows.length }, (_, i) => values[2 * rows[i >> 1] + (i & 1)]);
    const u = (network, state, from, to) => math.evaluate(network, state, from.length, from, to, new Float64Array(state.length));
    if (this.method === "consistency") { // one step of Heun along v, then the averaged network's end
      const rows = rowsOf(() => true), s = t.map((time) => Math.max(time - STEP, 0)), after = math.velocity(this.mixture, moved(rows, z, s, v), n, s, new Float64Array(2 * n));
      const state = moved(rows, z, s, v.map((value, i) => (value + after[i]) / 2)), rest = u(this.averaged, state, s, new Float64Array(n));
      return out.map((_, i) => (z[i] - (state[i] - s[i >> 1] * rest[i])) / t[i >> 1]);
    }
    const eulerian = (k) => objective_draw[k] < EULERIAN[this.method];
    let rows = rowsOf((k) => t[k] > r[k] && eulerian(k));
    const later = rows.map((k) => Math.min(1, t[k] + DELTA)), earlier = rows.map((k) => Math.max(r[k], t[k] - DELTA)), [here, speed] = [at(rows, z), at(rows, v)], size = here.length;
    const both = new Float64Array(2 * size), ends = rows.map((k) => r[k]);
    both.set(moved(rows, here, later, speed)), both.set(moved(rows, here, earlier, speed), size);
    const du = u(this.network, both, [...later, ...earlier], [...ends, ...ends]);
    rows.forEach((k, j) => [0, 1].forEach((d) => (out[2 * k + d] -= ((t[k] - r[k]) * (du[2 * j + d] - du[size + 2 * j + d])) / (later[j] - earlier[j]))));
    rows = rowsOf((k) => t[k] > r[k] && !eulerian(k));
    const s = rows.map((k) => r[k] + split[k] * (t[k] - r[k])), from = at(rows, z), one = u(this.network, from, rows.map((k) => t[k]), s);
    const other = u(this.network, moved(rows, from, s, one), s, rows.map((k) => r[k]));
    rows.forEach((k, j) => [0, 1].forEach((d) => (out[2 * k + d] = other[2 * j + d] + ((t[k] - s[j]) / (t[k] - r[k])) * (one[2 * j + d] - other[2 * j + d]))));
    return out;
  }

  /** The mean weighted loss of a batch; its gradient is `grads`. */
  gradient(batch) {
    const { x, eps, t } = batch, n = t.length, edge = this.method === "consistency", r = edge ? new Float64Array(n) : batch.r;
    const z = x.map((value, i) => (1 - t[i >> 1]) * value + t[i >> 1] * eps[i]), v = math.velocity(this.mixture, z, n, t, new Float64Array(2 * n));
    const target = this.target(z, v, batch), kept = [], away = math.evaluate(this.network, z, n, t, r, new Float64Array(2 * n), 2, kept).map((value, i) => value - target[i]);
    let loss = 0;
    for (let k = 0; k < n; k++) {
      const error = (away[2 * k] ** 2 + away[2 * k + 1] ** 2) / 2, weight = (edge ? 1 : Math.sqrt(1 - t[k])) / Math.sqrt(error + 5e-3) / n;
      (loss += weight * error), (away[2 * k] *= weight), (away[2 * k + 1] *= weight);
    }
    this.grads = new Float64Array(this.weights.length);
    math.backward(this.network, kept, n, away, this.grads);
    return loss;
  }

  step(batch = this.batch()) {
    const { weights, grads, first, second, average, method } = Object.assign(this, { loss: this.gradient(batch) }), [b1, b2] = BETAS, count = ++this.steps;
    if (!Number.isFinite(this.loss)) throw new Error(`the loss of ${method} is ${this.loss} at step ${count}`);
    const rate = (RATE * Math.min(1, count / WARMUP) * (1 + Math.cos((Math.PI * (count - 1)) / STEPS))) / 2, keep = count > 1 ? (method === "consistency" ? 0.5 : 0.97) : 0;
    for (let i = 0; i < weights.length; i++) {
      first[i] += (1 - b1) * (grads[i] - first[i]);
      second[i] += (1 - b2) * (grads[i] * grads[i] - second[i]);
      weights[i] -= ((rate / (1 - b1 ** count)) * first[i]) / (Math.sqrt(second[i] / (1 - b2 ** count)) + 1e-8);
      average[i] += (1 - keep) * (weights[i] - average[i]);
    }
    math.setWeights(this.network, weights);
    if (method === "consistency") math.setWeights(this.averaged, average);
  }

  /** Train for so many milliseconds, at most up to STEPS: { weights, the averaged ones; steps; seconds; loss }. */
  run(milliseconds) {
    const began = performance.now();
    while (this.steps < STEPS && performance.now() - began < milliseconds) this.step();
    this.seconds += (performance.now() - began) / 1000;
    const { average, steps, seconds, loss } = this;
    return { weights: Float32Array.from(average), steps, seconds, loss };
  }
}

let learner = null;
/** A worker's answer to { task }, a Learner's, or to the milliseconds to train for. */
export const answer = ({ data }) => (data.task ? void (learner = new Learner(data.task)) : postMessage(learner.run(data)));

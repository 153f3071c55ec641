// The library's mathematics for the page: the same functions u(z, t, r), from the same weights, without a kernel.
//
// A network is { sizes, flat, weights, turns }: its weights as `makeNetwork` gets them, and [W (out x in), b] per layer, in
// float64; states are rows of numbers, one after another. tests/live/test_compute.py holds all of this against torch.

// kernel.wat, compiled: one layer of four rows and four outputs at a time. Where WebAssembly is switched off, `dense` below.
const ROWS = 256, WIDEST = 96, BUFFER = 4 * ROWS * WIDEST, ZERO = 3 * BUFFER; // rows per call; four buffers, one of zeros, lie before the weights
const kernel = (() => {
  try {
    return new WebAssembly.Instance(new WebAssembly.Module(Uint8Array.from(atob("AGFzbQEAAAABGQNgAXsBe2AIf39/f39/f38AYAV/f39/fwADBAMAAQIFAwEAQAcZAwZtZW1vcnkCAAVsYXllcgABBGJlbmQAAgraBwOIAwECeyAA/QxhVxPAYVcTwGFXE8BhVxPA/eYB/QwAAIA/AACAPwAAgD8AAIA//QwTJzc9Eyc3PRMnNz0TJzc9IAAgAP3mAf3mAf3kAf3mASEB/QwAAPzCAAD8wgAA/MIAAPzC/QwAAPxCAAD8QgAA/EIAAPxCIAH96AH96QEhASAB/WohAiABIAL95QEhAf0MAACAPwAAgD8AAIA/AACAP/0MAACAPwAAgD8AAIA/AACAPyAC/fgB/Qx/AAAAfwAAAH8AAAB/AAAA/a4BQRf9qwH9DAAAgD8AAIA/AACAPwAAgD8gAf0MGHIxPxhyMT8YcjE/GHIxPyAB/Qzw/XU+8P11PvD9dT7w/XU+IAH9DEdYYz1HWGM9R1hjPUdYYz0gAf0MXJUdPFyVHTxclR08XJUdPCAB/QwjxK46I8SuOiPErjojxK46IAH9DEg0IjlINCI5SDQiOUg0Ijn95gH95AH95gH95AH95gH95AH95gH95AH95gH95AH95gH95AH95gH95AH95wELoAMCCH8FeyAEQQJ0IQ8gBUECdCEOA0BBACEJA0AgAyAJav0ABAAhESARIRIgESETIBEhFCAAIAggD2xqIQogAiAJaiELIAQhDANAIAv9AAQAIRAgESAQIAr9CQIA/eYB/eQBIREgEiAQIAogD2r9CQIA/eYB/eQBIRIgEyAQIAogD0EBdGr9CQIA/eYB/eQBIRMgFCAQIAogD0EDbGr9CQIA/eYB/eQBIRQgCkEEaiEKIAsgDmohCyAMQQFrIgwNAAsgACAIIA9saiAJaiEKIAYgCCAObGogCWohDSAHBEAgESAREAD95gEhESASIBIQAP3mASESIBMgExAA/eYBIRMgFCAUEAD95gEhFCAEIAVGBEAgESAK/QAEAP3kASERIBIgCiAPav0ABAD95AEhEiATIAogD0EBdGr9AAQA/eQBIRMgFCAKIA9BA2xq/QAEAP3kASEUCwsgDSAR/QsEACANIA5qIBL9CwQAIA0gDkEBdGogE/0LBAAgDSAOQQNsaiAU/QsEACAJQRBqIgkgDkkNAAsgCEEEaiIIIAFJDQALC6sBAgN7AX8DQCAAIAhq/QAEACEFIAUQACEGIAUgBv3mASEHIAIgCGogByABIAhq/QAEAP3kAf0LBAAgAyAIaiAGIAf9DAAAgD8AAIA/AACAPwAAgD8gBv3lAf3mAf0MKkLMPypCzD8qQsw/KkLMP/0MtTNbPrUzWz61M1s+tTNbPiAFIAX95gH95gH95AH95gH95AH9CwQAIAhBEGohCCAEQQRrIgRBAEoNAAsL"), (letter) => letter.charCodeAt(0)))).exports;
  } catch {
    return null;
  }
})();
let free = 4 * BUFFER; // the next address in the kernel's memory
export const fast = kernel !== null;

/** The MLP of networks/mlp.py from one copy of its weights. flat: W0 (in x out), b0, W1, b1, ... */
export function makeNetwork(flat, sizes, turns = [0.125, 0.25, 0.5]) {
  const weights = [], places = [], count = countOf(sizes);
  if (flat.length !== count) throw new Error(`${flat.length} weights for layers of ${sizes}; expected ${count}: weights of another version`);
  for (let k = 0; k + 1 < sizes.length; k++) {
    const [fanIn, fanOut] = [sizes[k], sizes[k + 1]], wide = whole(fanOut);
    weights.push([new Float64Array(fanIn * fanOut), new Float64Array(fanOut)]);
    if (kernel) places.push([free, free + 4 * fanIn * wide]), (free += 4 * (fanIn + 1) * wide);
  }
  const lacking = kernel ? free - kernel.memory.buffer.byteLength : 0;
  if (lacking > 0) kernel.memory.grow(Math.ceil(lacking / 65536));
  return setWeights({ sizes, weights, turns, places }, flat);
}

export const countOf = (sizes) => sizes.slice(1).reduce((sum, out, k) => sum + (sizes[k] + 1) * out, 0);
const whole = (number) => (number + 3) & ~3;

/** Give a network other weights, of the form of `makeNetwork`. */
export function setWeights(network, flat) {
  const { sizes, weights, places } = network, floats = kernel && new Float32Array(kernel.memory.buffer);
  let at = 0;
  weights.forEach(([W, b], k) => {
    const [fanIn, fanOut] = [sizes[k], sizes[k + 1]];
    for (let i = 0; i <= fanIn; i++) floats?.set(flat.subarray(at + i * fanOut, at + (i + 1) * fanOut), places[k][0] / 4 + i * whole(fanOut));
    for (let i = 0; i < fanIn; i++) for (let o = 0; o < fanOut; o++) W[o * fanIn + i] = flat[at++];
    b.set(flat.subarray(at, (at += fanOut)));
  });
  return Object.assign(network, { flat });
}

/** out = h W + b in float64, four rows at a time. */
function dense(h, n, [W, b], fanIn, fanOut, out) {
  for (let row = 0; row < n; row += 4) {
    const p = row * fanIn, q = p + fanIn, r = q + fanIn, s = r + fanIn;
    for (let o = 0, w = 0; o < fanOut; o++) {
      let a0 = b[o], a1 = a0, a2 = a0, a3 = a0;
      for (let i = 0; i < fanIn; i++, w++) (a0 += W[w] * h[p + i]), (a1 += W[w] * h[q + i]), (a2 += W[w] * h[r + i]), (a3 += W[w] * h[s + i]);
      const at = row * fanOut + o;
      (out[at] = a0), (out[at + fanOut] = a1), (out[at + 2 * fanOut] = a2), (out[at + 3 * fanOut] = a3); // past the end: dropped
    }
  }
}

const GELU = 2 * Math.sqrt(2 / Math.PI);
const spare = new Map(); // scratch memory by name: a drag evaluates thousands of times
const scratch = (name, size) => {
  if (!(spare.get(name)?.length >= size)) spare.set(name, new Float64Array(size));
  return spare.get(name);
};

/** The input layer of rows `begin` to `end`: z (n D), sines and cosines of t and t - r, their logarithms. */
function inputs({ sizes: [first], turns }, z, begin, end, t, r, h) {
  const D = first - 4 * turns.length - 2, one = (times, row) => (typeof times === "number" ? times : times[row]), same = typeof t === "number" && typeof r === "number";
  for (let row = begin, at = 0; row < end; row++) {
    for (let i = 0; i < D; i++) h[at++] = z[row * D + i];
    if (same && row > begin) {
      h.copyWithin(at, D, first);
      at += first - D;
      continue;
    }
    const from = one(t, row), to = one(r, row);
    for (const wave of [Math.sin, Math.cos]) for (const time of [from, from - to]) for (const turn of turns) h[at++] = wave(2 * Math.PI * turn * time);
    h[at++] = 0.5 * Math.log(from + 0.02);
    h[at++] = 0.5 * Math.log(to + 0.02);
  }
}

/** u(z, t, r) of n rows: z (n D), t and r numbers or one per row; the first `numbers` outputs of each row into `out`.
 *  kept: an array that then holds what `backward` needs, { h, slope } per layer; at most 256 rows. */
export function evaluate(network, z, n, t, r, out, numbers = network.sizes.at(-1), kept = null) {
  const { sizes, weights, places } = network, last = weights.length - 1;
  const copy = (from, wide, begin, end) => {
    for (let row = begin, at = 0; row < end; row++, at += wide) for (let i = 0; i < numbers; i++) out[row * numbers + i] = from[at + i];
  };
  for (let begin = 0; kernel && begin < n; begin += ROWS) {
    const end = Math.min(n, begin + ROWS), rows = whole(end - begin), floats = new Float32Array(kernel.memory.buffer, 0, free / 4), wide = whole(sizes.at(-1));
    inputs(network, z, begin, end, t, r, floats);
    if (!kept) {
      places.forEach(([W, b], k) => kernel.layer(k && BUFFER * (1 + (k % 2)), rows, W, b, sizes[k], whole(sizes[k + 1]), BUFFER * (2 - (k % 2)), k < last));
      copy(floats.subarray((BUFFER / 4) * (2 - (last % 2))), wide, begin, end);
      continue;
    }
    places.forEach(([W, b], k) => {
      const [fanIn, fanOut] = [sizes[k], whole(sizes[k + 1])];
      kept.push({ h: floats.slice(0, n * fanIn) });
      kernel.layer(0, rows, W, b, fanIn, fanOut, BUFFER, 0);
      if (k === last) return;
      kernel.bend(BUFFER, fanIn === fanOut ? 0 : ZERO, 0, 2 * BUFFER, rows * fanOut);
      kept[k].slope = floats.slice(BUFFER / 2, BUFFER / 2 + n * fanOut);
    });
    copy(floats.subarray(BUFFER / 4), wide, begin, end);
  }
  if (kernel) return out;
  const memory = (name, size) => (kept ? new Float64Array(size) : scratch(name, size));
  let h = memory("in", n * sizes[0]);
  inputs(network, z, 0, n, t, r, h);
  for (let k = 0; k <= last; k++) {
    const [fanIn, fanOut] = [sizes[k], sizes[k + 1]], a = memory(k % 2 ? "odd" : "even", n * fanOut), slope = kept && k < last && new Float64Array(n * fanOut);
    dense(h, n, weights[k], fanIn, fanOut, a);
    kept?.push({ h, slope });
    if (k === last) copy(a, fanOut, 0, n);
    for (let i = 0; k < last && i < n * fanOut; i++) {
      const x = a[i], gate = 1 / (1 + Math.exp(-GELU * (x + 0.044715 * x * x * x)));
      if (slope) slope[i] = gate + x * gate * (1 - gate) * GELU * (1 + 0.134145 * x * x);
      a[i] = x * gate + (fanIn === fanOut ? h[i] : 0);
    }
    h = a;
  }
  return out;
}

/** A (n x inner) B (inner x outer), rows of numbers. */
function product(A, n, inner, B, outer) {
  const wide = whole(outer), out = new (kernel ? Float32Array : Float64Array)(n * outer);
  if (kernel) {
    const floats = new Float32Array(kernel.memory.buffer, 0, free / 4);
    floats.set(A);
    for (let i = 0; i < inner; i++) for (let o = 0; o < outer; o++) floats[BUFFER / 4 + i * wide + o] = B[i * outer + o];
    kernel.layer(0, whole(n), BUFFER, ZERO, inner, wide, 2 * BUFFER, 0);
    for (let row = 0; row < n; row++) for (let o = 0; o < outer; o++) out[row * outer + o] = floats[BUFFER / 2 + row * wide + o];
    return out;
  }
  for (let row = 0; row < n; row++)
    for (let i = 0; i < inner; i++) for (let o = 0, a = A[row * inner + i]; o < outer; o++) out[row * outer + o] += a * B[i * outer + o];
  return out;
}

const transposed = (A, rows, columns) => {
  const out = new A.constructor(rows * columns);
  for (let row = 0, at = 0; row < rows; row++) for (let i = 0; i < columns; i++) out[i * rows + row] = A[at++];
  return out;
};

/** Reverse mode through `evaluate`: from d loss / d out (n x outputs) the gradients of the weights, added to `grads` (of
 *  the form of `flat`), and d loss / d z (n D). */
export function backward({ sizes, flat, turns }, kept, n, dOut, grads) {
  let d = dOut, end = flat.length;
  for (let k = sizes.length - 2; k >= 0; k--) {
    const [fanIn, fanOut] = [sizes[k], sizes[k + 1]], { h, slope } = kept[k], da = slope ? d.map((value, i) => value * slope[i]) : d, biases = end - fanOut;
    for (let row = 0, at = 0; row < n; row++) for (let o = 0; o < fanOut; o++) grads[biases + o] += da[at++];
    end = biases - fanIn * fanOut;
    product(transposed(h, n, fanIn), fanIn, n, da, fanOut).forEach((value, i) => (grads[end + i] += value));
    const dh = product(da, n, fanOut, transposed(flat.subarray(end, biases), fanIn, fanOut), fanIn);
    for (let i = 0; slope && fanIn === fanOut && i < dh.length; i++) dh[i] += d[i];
    d = dh;
  }
  const D = sizes[0] - 4 * turns.length - 2, dz = new Float64Array(n * D);
  for (let row = 0; row < n; row++) for (let i = 0; i < D; i++) dz[row * D + i] = d[row * sizes[0] + i];
  return dz;
}

/** v(z, t) of a mixture of equal Gaussians on the plane (mixtures.py), rows z (n 2): { means (K 2), sigma }; t: one, or one per row. */
export function velocity({ means, sigma }, z, n, t, out) {
  const K = means.length / 2, apart = scratch("apart", K);
  for (let row = 0; row < n; row++) {
    const time = typeof t === "number" ? t : t[row], keep = 1 - time, variance = (keep * sigma) ** 2 + time * time, slope = (time - keep * sigma * sigma) / variance;
    const x = z[2 * row], y = z[2 * row + 1];
    let least = Infinity;
    for (let k = 0; k < K; k++) {
      const dx = x - keep * means[2 * k], dy = y - keep * means[2 * k + 1];
      apart[k] = (dx * dx + dy * dy) / (2 * variance);
      if (apart[k] < least) least = apart[k];
    }
    let sum = 0, mx = 0, my = 0;
    for (let k = 0; k < K; k++) {
      if (apart[k] > least + 36) continue; // below float64's last digit
      const weight = Math.exp(least - apart[k]);
      (sum += weight), (mx += weight * means[2 * k]), (my += weight * means[2 * k + 1]);
    }
    out[2 * row] = slope * x - ((keep * slope + 1) * mx) / sum;
    out[2 * row + 1] = slope * y - ((keep * slope + 1) * my) / sum;
  }
  return out;
}

const substeps = (t, r) => Math.max(1, Math.ceil(56 * (Math.sqrt(t) - Math.sqrt(r))));
/** How often `flow` evaluates the velocity. */
export const solves = (times) => times.slice(1).reduce((sum, r, k) => sum + 4 * substeps(times[k], r), 0);

/** The exact flow along falling `times`: [states]; RK4, with steps that shorten towards the data as sqrt(t) does. */
export function flow(mixture, z, n, times) {
  const size = 2 * n, [k1, k2, k3, k4, half] = Array.from({ length: 5 }, () => new Float64Array(size)), path = [Float64Array.from(z)];
  for (let k = 0; k + 1 < times.length; k++) {
    const [from, to] = [Math.sqrt(times[k]), Math.sqrt(times[k + 1])], count = substeps(times[k], times[k + 1]), state = Float64Array.from(path[k]);
    for (let j = 0; j < count; j++) {
      const t = (from + (j / count) * (to - from)) ** 2, r = (from + ((j + 1) / count) * (to - from)) ** 2, h = r - t, middle = (t + r) / 2;
      velocity(mixture, state, n, t, k1);
      for (let i = 0; i < size; i++) half[i] = state[i] + (h / 2) * k1[i];
      velocity(mixture, half, n, middle, k2);
      for (let i = 0; i < size; i++) half[i] = state[i] + (h / 2) * k2[i];
      velocity(mixture, half, n, middle, k3);
      for (let i = 0; i < size; i++) half[i] = state[i] + h * k3[i];
      velocity(mixture, half, n, r, k4);
      for (let i = 0; i < size; i++) state[i] += (h / 6) * (k1[i] + 2 * k2[i] + 2 * k3[i] + k4[i]);
    }
    path.push(state);
  }
  return path;
}

/** Jumps along `times`, z - (t - r) u: [states]. u(z, n, t, r, out); eps: noises to start over with (consistency), or null. */
export function rollout(u, z, n, times, eps = null) {
  const path = [Float64Array.from(z)], speed = new Float64Array(z.length);
  for (let k = 0; k + 1 < times.length; k++) {
    const [t, r] = [times[k], times[k + 1]], before = path[k], to = eps ? 0 : r;
    u(before, n, t, to, speed);
    const state = before.map((value, i) => value - (t - to) * speed[i]);
    path.push(eps && r > 0 ? state.map((value, i) => (1 - r) * value + r * eps[k][i]) : state);
  }
  return path;
}

export const timeGrid = (steps) => Array.from({ length: steps + 1 }, (_, k) => 1 - k / steps);

/** The times 1 -> t_g -> t_{g+1} -> 0 of backward simulation, without jumps of length zero. */
export const simulationTimes = (N, g) => [1, (N - g) / N, (N - g - 1) / N, 0].filter((time, k, all) => !k || time < all[k - 1]);

export const pathError = (end, exact) => {
  let sum = 0;
  for (let i = 0; i < end.length; i += 2) sum += Math.hypot(end[i] - exact[i], end[i + 1] - exact[i + 1]);
  return (2 * sum) / end.length;
};

/** Two standard errors of that mean: how far it scatters with other noises. */
export const scatter = (end, exact) => {
  const mean = pathError(end, exact), count = end.length / 2;
  return (2 * Math.hypot(...Array.from({ length: count }, (_, i) => Math.hypot(end[2 * i] - exact[2 * i], end[2 * i + 1] - exact[2 * i + 1]) - mean))) / count;
};

/** Sorted projections of points (n 2) on 128 directions: of a reference they are needed again and again. */
export function projections(points, count = 128) {
  return Array.from({ length: count }, (_, k) => {
    const cos = Math.cos((k * Math.PI) / count), sin = Math.sin((k * Math.PI) / count), along = new Float64Array(points.length / 2);
    for (let i = 0; i < along.length; i++) along[i] = cos * points[2 * i] + sin * points[2 * i + 1];
    return along.sort();
  });
}

export function slicedW2(points, reference) {
  let sum = 0;
  projections(points, reference.length).forEach((along, k) => along.forEach((value, i) => (sum += (value - reference[k][i]) ** 2)));
  return Math.sqrt(sum / (reference.length * reference[0].length));
}

/** torch's generator on a CPU: Mersenne Twister 19937. random() is its next 32 bits. */
export class Generator {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let k = 1; k < 624; k++) this.state[k] = Math.imul(1812433253, this.state[k - 1] ^ (this.state[k - 1] >>> 30)) + k;
    this.at = 624;
  }
  random() {
    const { state } = this;
    if (this.at === 624) {
      for (let k = 0; k < 624; k++) {
        const mixed = (state[k] & 0x80000000) | (state[(k + 1) % 624] & 0x7fffffff);
        state[k] = state[(k + 397) % 624] ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
      }
      this.at = 0;
    }
    let value = state[this.at++];
    value ^= value >>> 11;
    value ^= (value << 7) & 0x9d2c5680;
    value ^= (value << 15) & 0xefc60000;
    return (value ^ (value >>> 18)) >>> 0;
  }
  rand(count) {
    return Float64Array.from({ length: count }, () => (this.random() & 0xffffff) / 2 ** 24);
  }
  /** torch.randn of 16 numbers or more: Box and Muller in groups of 16, the last group drawn anew if it is not whole. */
  randn(count) {
    const out = this.rand(count), normal = (at) => {
      for (let j = at; j < at + 8; j++) {
        const radius = Math.sqrt(-2 * Math.log(1 - out[j])), angle = 2 * Math.PI * out[j + 8];
        (out[j] = radius * Math.cos(angle)), (out[j + 8] = radius * Math.sin(angle));
      }
    };
    for (let at = 0; at + 16 <= count; at += 16) normal(at);
    if (count % 16) out.set(this.rand(16), count - 16), normal(count - 16);
    return out;
  }
}

/** The normal quantile (Wichura, AS 241), right to 1e-15. */
function quantile(p) {
  const q = p - 0.5, ratio = (x, a, b) => a.reduceRight((sum, c) => sum * x + c, 0) / b.reduceRight((sum, c) => sum * x + c, 0);
  if (Math.abs(q) <= 0.425)
    return q * ratio(0.180625 - q * q,
      [3.387132872796366608, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125, 45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727],
      [1, 42.313330701600911252, 687.1870074920579083, 5394.1960214247511077, 21213.794301586595867, 39307.89580009271061, 28729.085735721942674, 5226.495278852545925]);
  const r = Math.sqrt(-Math.log(Math.min(p, 1 - p)));
  const size = r <= 5
    ? ratio(r - 1.6,
      [1.42343711074968357734, 4.6303378461565452959, 5.7694972214606914055, 3.64784832476320460504, 1.27045825245236838258, 0.24178072517745061177, 0.0227238449892691845833, 7.7454501427834140764e-4],
      [1, 2.05319162663775882187, 1.6763848301838038494, 0.68976733498510000455, 0.14810397642748007459, 0.0151986665636164571966, 5.475938084995344946e-4, 1.05075007164441684324e-9])
    : ratio(r - 5,
      [6.6579046435011037772, 5.4637849111641143699, 1.7848265399172913358, 0.29656057182850489123, 0.026532189526576123093, 0.0012426609473880784386, 2.71155556874348757815e-5, 2.01033439929228813265e-7],
      [1, 0.59983220655588793769, 0.13692988092273580531, 0.0148753612908506148525, 7.868691311456132591e-4, 1.8463183175100546818e-5, 1.4215117583164458887e-7, 2.04426310338993978564e-15]);
  return Math.sign(q) * size;
}

/** Normal quantiles of scrambled Sobol points, (count D), from torch's own state: directions (D 30) and shift (D). */
export function sobolNoise({ directions, shift }, count) {
  const D = shift.length, point = Int32Array.from(shift), out = new Float32Array(count * D);
  for (let row = 0; row < count; row++) {
    if (row) for (let d = 0, bit = 31 - Math.clz32(~(row - 1) & row); d < D; d++) point[d] ^= directions[30 * d + bit];
    for (let d = 0; d < D; d++) out[row * D + d] = quantile(Math.min(1 - 1e-9, Math.max(1e-9, point[d] / 2 ** 30)));
  }
  return out;
}

// Small videos in the page: what runs the graphs of graphs.json (live/graphs.py), samples with them, and measures clips.
//
// Each node of a graph is an operation on tensors { shape, data }, float32. tests/live/test_video.py holds all of this
// against torch.

const size = (shape) => shape.reduce((product, side) => product * side, 1);
const tensor = (shape, data = new Float32Array(size(shape))) => ({ shape, data });
const stridesOf = (shape) => shape.reduceRight((strides, side, dim) => ((strides[dim] = dim + 1 < shape.length ? strides[dim + 1] * shape[dim + 1] : 1), strides), []);

/** Numbers of x where it is walked in `shape` with these strides, into a new tensor. */
function walk({ data }, shape, strides, start = 0) {
  const out = tensor(shape), depth = shape.length - 1, to = out.data;
  let at = 0;
  const go = (dim, from) => {
    const [side, step] = [shape[dim], strides[dim]];
    if (dim === depth) for (let i = 0; i < side; i++, from += step) to[at++] = data[from];
    else for (let i = 0; i < side; i++, from += step) go(dim + 1, from);
  };
  depth < 0 ? (to[0] = data[start]) : go(0, start);
  return out;
}
const expand = (x, shape) => {
  const more = shape.length - x.shape.length, strides = stridesOf(x.shape);
  return walk(x, shape, shape.map((side, dim) => (dim < more || x.shape[dim - more] === 1 ? 0 : strides[dim - more])));
};
const each = (x, change) => tensor(x.shape, x.data.map(change));
function pair(a, b, join) {
  if (typeof b === "number") return each(a, (value) => join(value, b));
  if (typeof a === "number") return each(b, (value) => join(a, value));
  const depth = Math.max(a.shape.length, b.shape.length), side = ({ shape }, dim) => shape[dim - depth + shape.length] ?? 1;
  const shape = Array.from({ length: depth }, (_, dim) => Math.max(side(a, dim), side(b, dim)));
  const [x, y] = [a, b].map((part) => (part.data.length === size(shape) ? part : expand(part, shape)).data);
  return tensor(shape, x.map((value, i) => join(value, y[i])));
}
/** reduce(data, start, step, count) of every line along a dimension. */
function along({ shape, data }, dim, reduce) {
  const step = size(shape.slice(dim + 1)), count = shape[dim], out = tensor(shape.map((side, k) => (k === dim ? 1 : side)));
  for (let i = 0; i < out.data.length; i++) out.data[i] = reduce(data, Math.floor(i / step) * step * count + (i % step), step, count);
  return out;
}
const sum = (data, start, step, count) => {
  let total = 0;
  for (let k = 0; k < count; k++) total += data[start + k * step];
  return total;
};
/** Change the rows of the last dimension: change(row) in place. */
function rows(x, change) {
  const out = tensor(x.shape, x.data.slice()), side = x.shape.at(-1);
  for (let at = 0; at < out.data.length; at += side) change(out.data.subarray(at, at + side));
  return out;
}

/** (..., n, k) times (..., k, m) or (k, m), four numbers at a time. */
function bmm(a, b) {
  const [n, k] = a.shape.slice(-2), m = b.shape.at(-1), out = tensor([...a.shape.slice(0, -1), m]), [left, right, to] = [a.data, b.data, out.data];
  for (let row = 0; row < to.length / m; row++) {
    const start = row * k, from = b.shape.length > 2 ? Math.floor(row / n) * k * m : 0;
    let o = 0;
    for (; o + 4 <= m; o += 4) {
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let i = 0, q = from + o; i < k; i++, q += m) {
        const x = left[start + i];
        (s0 += x * right[q]), (s1 += x * right[q + 1]), (s2 += x * right[q + 2]), (s3 += x * right[q + 3]);
      }
      const at = row * m + o;
      (to[at] = s0), (to[at + 1] = s1), (to[at + 2] = s2), (to[at + 3] = s3);
    }
    for (; o < m; o++) {
      let total = 0;
      for (let i = 0; i < k; i++) total += left[start + i] * right[from + o + i * m];
      to[row * m + o] = total;
    }
  }
  return out;
}

/** Of two or three dimensions; x is padded already. */
function conv(x, weight, bias, stride) {
  const flat = x.shape.length === 4, three = ({ shape }) => (flat ? [...shape.slice(0, 2), 1, ...shape.slice(2)] : shape);
  const [B, C, F, H, W] = three(x), [O, , f, h, w] = three(weight), [sf, sh, sw] = flat ? [1, ...stride] : stride;
  const [T, R, S] = [Math.floor((F - f) / sf) + 1, Math.floor((H - h) / sh) + 1, Math.floor((W - w) / sw) + 1], out = tensor(flat ? [B, O, R, S] : [B, O, T, R, S]);
  const count = (H - h) * W + W - w + 1, plane = new Float64Array(count), data = Float64Array.from(x.data); // all places of a plane, those between the strides too
  let at = 0;
  for (let b = 0; b < B; b++) for (let o = 0; o < O; o++) for (let t = 0; t < T; t++) {
    plane.fill(bias.data[o]);
    for (let c = 0, kernel = o * C * f * h * w; c < C; c++) for (let i = 0; i < f; i++) for (let j = 0; j < h; j++) {
      let from = ((b * C + c) * F + t * sf + i) * H * W + j * W, k = 0;
      for (; k + 3 <= w; k += 3, kernel += 3, from += 3) {
        const [left, middle, right] = weight.data.subarray(kernel, kernel + 3);
        for (let p = 0, q = from; p < count; p++, q++) plane[p] += left * data[q] + middle * data[q + 1] + right * data[q + 2];
      }
      for (; k < w; k++, from++) {
        const value = weight.data[kernel++];
        for (let p = 0; p < count; p++) plane[p] += value * data[from + p];
      }
    }
    for (let r = 0; r < R; r++) for (let s = 0; s < S; s++) out.data[at++] = plane[r * sh * W + s * sw];
  }
  return out;
}

/** The error function, to 2e-7: by its series up to 2, beyond it by Abramowitz and Stegun 7.1.26. */
function erf(x) {
  const size = Math.abs(x);
  if (size < 2) {
    let term = x, total = x;
    for (let k = 1; k < 30; k++) (term *= (-x * x) / k), (total += term / (2 * k + 1));
    return (2 / Math.sqrt(Math.PI)) * total;
  }
  const t = 1 / (1 + 0.3275911 * size);
  return Math.sign(x) * (1 - t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * Math.exp(-x * x));
}

const OPERATIONS = {
  constant: (shape, numbers) => tensor(shape, Float32Array.from(numbers)),
  view: (x, shape) => tensor(shape, x.data),
  expand,
  permute: (x, order) => ((strides) => walk(x, order.map((dim) => x.shape[dim]), order.map((dim) => strides[dim])))(stridesOf(x.shape)),
  slice(x, dim, start, step, length) {
    const strides = stridesOf(x.shape);
    return walk(x, x.shape.map((side, k) => (k === dim ? length : side)), strides.map((stride, k) => (k === dim ? stride * step : stride)), start * strides[dim]);
  },
  cat(dim, ...parts) {
    const shape = parts[0].shape.map((side, k) => (k === dim ? parts.reduce((total, part) => total + part.shape[dim], 0) : side)), out = tensor(shape), inner = size(shape.slice(dim + 1));
    let to = 0;
    for (let outer = 0; outer < size(shape.slice(0, dim)); outer++)
      for (const { shape, data } of parts) {
        const wide = shape[dim] * inner;
        out.data.set(data.subarray(outer * wide, (outer + 1) * wide), to);
        to += wide;
      }
    return out;
  },
  pad(x, sides) {
    const shape = x.shape.map((side, dim) => side + sides[dim][0] + sides[dim][1]), out = tensor(shape), strides = stridesOf(shape), wide = x.shape.at(-1);
    for (let from = 0; from < x.data.length; from += wide) {
      let to = sides.at(-1)[0], left = from / wide;
      for (let dim = shape.length - 2; dim >= 0; dim--) (to += ((left % x.shape[dim]) + sides[dim][0]) * strides[dim]), (left = Math.floor(left / x.shape[dim]));
      out.data.set(x.data.subarray(from, from + wide), to);
    }
    return out;
  },
  pick(x, dim, places) {
    const parts = places.map((place) => OPERATIONS.slice(x, dim, place, 1, 1));
    return OPERATIONS.cat(dim, ...parts);
  },
  add: (a, b) => pair(a, b, (x, y) => x + y),
  sub: (a, b) => pair(a, b, (x, y) => x - y),
  mul: (a, b) => pair(a, b, (x, y) => x * y),
  div: (a, b) => pair(a, b, (x, y) => x / y),
  pow: (a, b) => pair(a, b, (x, y) => (y === 2 ? x * x : x ** y)),
  cos: (x) => each(x, Math.cos),
  sin: (x) => each(x, Math.sin),
  log: (x) => each(x, Math.log),
  rsqrt: (x) => each(x, (value) => 1 / Math.sqrt(value)),
  sigmoid: (x) => each(x, (value) => 1 / (1 + Math.exp(-value))),
  gelu: (x) => each(x, (value) => 0.5 * value * (1 + erf(value / Math.SQRT2))),
  gelu_tanh: (x) => each(x, (value) => value / (1 + Math.exp(-2 * Math.sqrt(2 / Math.PI) * (value + 0.044715 * value * value * value)))),
  clamp: (x, low, high) => each(x, (value) => Math.min(high ?? Infinity, Math.max(low ?? -Infinity, value))),
  sum: (x, dim) => along(x, dim, sum),
  mean: (x, dim) => along(x, dim, (data, start, step, count) => sum(data, start, step, count) / count),
  softmax: (x) => rows(x, (row) => {
    const most = row.reduce((a, b) => Math.max(a, b), -Infinity);
    let total = 0;
    for (let i = 0; i < row.length; i++) total += row[i] = Math.exp(row[i] - most);
    for (let i = 0; i < row.length; i++) row[i] /= total;
  }),
  norm: (x, epsilon) => rows(x, (row) => {
    let mean = 0, square = 0;
    for (const value of row) mean += value / row.length;
    for (const value of row) square += (value - mean) ** 2 / row.length;
    for (let i = 0; i < row.length; i++) row[i] = (row[i] - mean) / Math.sqrt(square + epsilon);
  }),
  bmm,
  conv,
};

/** run(inputs) of a graph with these weights, {name: tensor}: the tensor that it puts out. */
export function makeRunner({ nodes, out }, weights) {
  const place = (text) => (typeof text === "string" && text[0] === "#" ? Number(text.slice(1)) : null);
  const moves = nodes.map(() => false), kept = nodes.map(() => null), last = nodes.map(() => nodes.length);
  nodes.forEach(([operation, ...parts], k) => {
    const before = parts.map(place).filter((other) => other !== null);
    moves[k] = operation === "input" || before.some((other) => moves[other]);
    for (const other of before) last[other] = k;
  });
  last[place(out)] = nodes.length;
  return (inputs) => {
    const values = [...kept];
    nodes.forEach(([operation, ...parts], k) => {
      if (values[k]) return;
      const read = (part) => (place(part) !== null ? values[place(part)] : typeof part === "string" ? weights[part.slice(1)] : part);
      values[k] = operation === "input" ? inputs[parts[0]] : OPERATIONS[operation](...parts.map(read));
      if (!moves[k]) kept[k] = values[k]; // the same every time
      for (const part of parts) if (moves[place(part)] && last[place(part)] === k) values[place(part)] = null;
    });
    return values[place(out)];
  };
}

export const tensorOf = (values, shape) => tensor(shape, Float32Array.from(values));

/** The weights {name: tensor} of a network from its flat numbers, 16 bits each; order: [name, shape] of each. */
export function weightsOf(flat, order) {
  const weights = {}, all = Float32Array.from(flat, half);
  let at = 0;
  for (const [name, shape] of order) weights[name] = tensor(shape, all.subarray(at, (at += size(shape))));
  if (at !== all.length) throw new Error(`${all.length} weights for a network of ${at}: weights of another version`);
  return weights;
}
const half = (bits) => {
  const [sign, power, rest] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  return sign * (power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -24 * rest);
};

const CHUNKS = [1, 2, 2]; // frames
const both = (time) => tensor([2], Float32Array.of(time, time));
const step = (z, u, length) => OPERATIONS.sub(z, OPERATIONS.mul(u, length));

/** Where the noise z (2 5 4 4 4) is taken along falling times; a generator, which rests after each evaluation.
 *  u: functions of [z, t, r, context], one, or one per chunk. how: of video/report.py. randn(count): fresh noise. */
export function* sampled(u, how, z, times, randn) {
  if (how.startsWith("causal")) {
    let context = null;
    for (const [number, frames] of CHUNKS.entries()) {
      const start = context ? context.shape[1] : 0, before = context;
      const chunk = ([z, t, r]) => u[number](before ? [z, t, r, before] : [z, t, r]);
      const end = yield* sampled([chunk], how.slice("causal ".length), OPERATIONS.slice(z, 1, start, 1, frames), times, randn);
      context = context ? OPERATIONS.cat(1, context, end) : end;
    }
    return context;
  }
  for (let k = 0; k + 1 < times.length; k++) {
    const [t, r] = [Math.fround(times[k]), Math.fround(times[k + 1])], to = { euler: t, consistency: 0 }[how] ?? r;
    const average = u[0]([z, both(t), both(to)]);
    z = step(z, average, how === "consistency" ? t : t - r);
    if (how === "consistency" && r > 0) z = OPERATIONS.add(OPERATIONS.mul(z, 1 - r), OPERATIONS.mul(tensor(z.shape, Float32Array.from(randn(z.data.length))), r));
    yield null;
  }
  return z;
}

// ---- measures: video/measures.py and video/motion.py

const SIDE = 16, SIGMA = 1.1, LOW = 3, HIGH = 12, REACH = [LOW - 1, HIGH + 1], ENERGY = Math.PI * SIGMA ** 2;
const profile = (centre) => Float64Array.from({ length: SIDE }, (_, pixel) => Math.exp(-0.5 * ((pixel - centre) / SIGMA) ** 2));
const between = (value, low, high) => Math.min(high, Math.max(low, value));
const PLACES = Array.from({ length: REACH[1] - REACH[0] + 1 }, (_, k) => REACH[0] + k), TEMPLATES = PLACES.map(profile);
const dot = (a, b) => a.reduce((total, value, i) => total + value * b[i], 0);
const squares = (a) => dot(a, a);

/** The four balls of a frame, the brightest first: { place: [x, y], amplitude }. */
export function findBalls(frame) {
  const rest = Float64Array.from(frame), balls = [], across = (line, x) => dot(rest.subarray(SIDE * line, SIDE * (line + 1)), x);
  const paint = (y, x, amplitude) => y.forEach((high, i) => x.forEach((wide, j) => (rest[SIDE * i + j] += amplitude * high * wide)));
  const refine = (ball) => {
    const [x, y] = ball.place.map(profile), slope = (bump, centre) => bump.map((value, pixel) => (value * (pixel - centre)) / SIGMA ** 2);
    const [slopeX, slopeY] = [slope(x, ball.place[0]), slope(y, ball.place[1])], lines = y.map((_, i) => across(i, x)), slopes = y.map((_, i) => across(i, slopeX));
    const brighter = Math.max(0, ball.amplitude + dot(lines, y) / (squares(x) * squares(y))), most = Math.max(0.05, brighter);
    const moves = [dot(slopes, y) / (squares(slopeX) * squares(y) * most), dot(lines, slopeY) / (squares(slopeY) * squares(x) * most)];
    const place = ball.place.map((at, k) => between(at + between(moves[k], -0.5, 0.5), ...REACH));
    paint(y, x, ball.amplitude), paint(profile(place[1]), profile(place[0]), -brighter);
    Object.assign(ball, { place, amplitude: brighter });
  };
  for (let count = 0; count < 4; count++) {
    let best = { score: -Infinity };
    for (const [column, x] of TEMPLATES.entries()) {
      const lines = Float64Array.from({ length: SIDE }, (_, line) => across(line, x));
      TEMPLATES.forEach((y, row) => {
        const score = dot(y, lines);
        if (score > best.score) best = { score, place: [PLACES[column], PLACES[row]] };
      });
    }
    const ball = { place: best.place, amplitude: Math.max(0, best.score / ENERGY) };
    paint(profile(ball.place[1]), profile(ball.place[0]), -ball.amplitude);
    balls.push(ball);
    for (let sweep = 0; sweep < 4; sweep++) balls.forEach(refine);
  }
  return balls.sort((a, b) => b.amplitude - a.amplitude);
}

/** The mean square distance of places from the straight flight between the walls that is nearest to them. */
function fitFlight(places) {
  const wide = HIGH - LOW, middle = (places.length - 1) / 2, time = places.map((_, k) => k - middle), spread = squares(time), mean = (values) => values.reduce((a, b) => a + b) / values.length;
  const place = places.map((at) => at - LOW), fold = (line) => wide - Math.abs(line - 2 * wide * Math.floor(line / (2 * wide)) - wide);
  let least = Infinity;
  for (let k = 0; k < 25; k++) {
    let line = time.map((t) => place[0] + (-1.2 + 0.1 * k) * (t - time[0]));
    for (let round = 0; round < 4; round++) {
      const unfolded = line.map((at, i) => ((period) => (at - period < wide ? period + place[i] : period + 2 * wide - place[i]))(Math.floor(at / (2 * wide)) * 2 * wide));
      const centre = mean(unfolded), velocity = dot(unfolded, time) / spread;
      line = time.map((t) => centre + velocity * t);
    }
    least = Math.min(least, mean(line.map((at, i) => (fold(at) - place[i]) ** 2)));
  }
  return least;
}

/** Of clips (2 T 16 16), one ball and two: the share of frames with as many, and how far they are off straight flights. */
export function measured({ shape: [clips, frames], data }) {
  let right = 0, off = 0;
  for (let clip = 0; clip < clips; clip++) {
    const balls = clip + 1, found = Array.from({ length: frames }, (_, k) => findBalls(data.subarray((clip * frames + k) * SIDE * SIDE, (clip * frames + k + 1) * SIDE * SIDE)));
    right += found.filter((all) => all.filter(({ amplitude }) => amplitude > 0.5).length === balls).length / (clips * frames);
    const places = found.map((all) => all.slice(0, balls).map(({ place }) => place)), apart = (a, b) => a.reduce((total, place, k) => total + squares(place.map((at, d) => at - b[k][d])), 0);
    let swap = false;
    const flown = places.map((now, k) => {
      if (balls > 1 && k && apart(now, [...places[k - 1]].reverse()) < apart(now, places[k - 1])) swap = !swap;
      return swap ? [...now].reverse() : now;
    });
    const errors = flown[0].flatMap((_, ball) => [0, 1].map((d) => fitFlight(flown.map((now) => now[ball][d]))));
    off += Math.sqrt(errors.reduce((a, b) => a + b) / errors.length) / clips;
  }
  return { right, off };
}

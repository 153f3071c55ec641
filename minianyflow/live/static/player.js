// The one player: it draws trajectories, and scrubs time without asking anybody.
//
// mountPlayer(element, scene, options)       draws panels whose arrays are { values, shape, scale }; needs no widget.
// mountScene(element, page, payload, ask)    controls above one player. Most scenes compute here (scenes.js); of another
//                                            `page.scenes` holds some, and `ask(state)` is told which is wanted.
// default { render }                         the widget (anywidget): traits `page`, `payload`, `state`; `shown` by a kernel.
//
import { COMPUTED, World } from "./scenes.js";

// What a browser test may read, on the root element .lm-player: data-ready, data-frames (pictures drawn so far),
// data-drawn (a hash of where everything was drawn), data-position (0 to 1), data-serial (of the scene), data-error.

const PLAYING = 5000; // milliseconds from one end to the other
const SMALLEST = 17; // font size of the player, in pixels, for which the sizes below are meant
const PROGRESS = 65000; // the whole way, in the units of when a pixel of a trail appears

function rgb(colour) {
  const value = parseInt(colour.slice(1), 16);
  return [(value >> 16) & 255, (value >> 8) & 255, value & 255];
}

const packed = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// The arrays of a scene: { values, shape, scale }; a value in data units is values[i] * scale.
function unpack(scene, payload) {
  const bytes = payload instanceof ArrayBuffer ? new Uint8Array(payload) : new Uint8Array(payload.buffer, payload.byteOffset, payload.byteLength);
  const arrays = {};
  for (const [name, { offset, shape, type, scale }] of Object.entries(scene.arrays)) {
    const [Kind, width] = { float16: [Uint16Array, 2], int16: [Int16Array, 2], uint8: [Uint8Array, 1], float32: [Float32Array, 4], int32: [Int32Array, 4] }[type];
    const count = shape.reduce((a, b) => a * b, 1);
    if (offset + count * width > bytes.length) throw new Error(`array ${name} ends at byte ${offset + count * width}; the payload has ${bytes.length}`);
    arrays[name] = { values: new Kind(bytes.slice(offset, offset + count * width).buffer), shape, scale };
  }
  return arrays;
}

// A scene whose fields name arrays ("a0"), with the arrays themselves there.
function filled(value, arrays) {
  if (typeof value === "string" && Object.hasOwn(arrays, value)) return arrays[value];
  if (Array.isArray(value)) return value.map((item) => filled(item, arrays));
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, filled(item, arrays)]));
  return value;
}

// Where `at` lies among `times`, which all rise or all fall: the place before it, and the fraction of the way to the next.
function locate(times, at) {
  const sign = times[times.length - 1] >= times[0] ? 1 : -1;
  let k = 0;
  while (k < times.length - 2 && sign * times[k + 1] <= sign * at) k++;
  const length = times.length > 1 ? times[k + 1] - times[k] : 0;
  return [k, length === 0 ? (sign * at >= sign * times[k] ? 1 : 0) : clamp((at - times[k]) / length, 0, 1)];
}

function disc(radius) {
  const reach = Math.ceil(radius + 1), spots = [];
  for (let y = -reach; y <= reach; y++)
    for (let x = -reach; x <= reach; x++) {
      const cover = clamp(radius + 0.5 - Math.hypot(x, y), 0, 1);
      if (cover > 0) spots.push([x, y, cover]);
    }
  return spots;
}

// ---- particles on the plane: pixels written by hand, since 3000 arcs a frame are too slow without a graphics card

class Plane {
  static aspect = 1;

  constructor(spec, player, before) {
    Object.assign(this, { spec, player, paths: spec.points, ghosts: spec.ghosts, exact: spec.exact });
    this.count = spec.count ?? this.paths.shape[1]; // so many particles are known so far
    this.hand = before?.hand ?? { chosen: 0, dragging: false };
    const same = before && before.paths.values === this.paths.values && before.count === this.count && before.spec.colour === spec.colour;
    if (same && before.ghosts?.values.length === this.ghosts?.values.length && !player.stirred) // what was drawn once serves again
      for (const name of ["look", "image", "out", "colour", "small", "large", "rim", "back", "faint", "strong", "base"]) this[name] = before[name];
    if (this.paths.shape[0] !== spec.times.length) throw new Error(`${spec.title}: ${this.paths.shape[0]} states at ${spec.times.length} times`);
  }

  // What stays while a noise is dragged, ghosts and the trails of the others, is drawn once per size and theme.
  prepare(context, size, ratio) {
    const { paths, spec } = this, followed = new Set(spec.followed || []), look = [size, ratio, this.player.ink("#ffffff")].join();
    Object.assign(this, { context, size, ratio, scale: size / (2 * spec.limit) });
    if (this.look !== look) {
      this.look = look;
      this.image = context.createImageData(size, size);
      this.out = new Uint32Array(this.image.data.buffer);
      this.colour = rgb(this.player.ink(spec.colour));
      [this.small, this.large, this.rim] = [1.7, 4, 5.4].map((radius) => disc(radius * ratio));
      this.back = new Uint32Array(size * size).fill(packed(rgb(this.player.ink("#ffffff"))));
      this.faint = new Uint16Array(size * size).fill(65535); // when the trail first crosses a pixel
      this.strong = new Uint16Array(size * size);
      const pen = disc(0.8 * ratio), dot = disc(1.4 * ratio), [ring, ghost] = ["#969696", "#c8c8c8"].map((colour) => rgb(this.player.ink(colour)));
      if (spec.ring) for (let k = 0; k < 2000; k++) this.onBack(spec.ring * Math.cos(k * 0.0031416), spec.ring * Math.sin(k * 0.0031416), pen, ring);
      for (let i = 0; this.ghosts && i < this.ghosts.values.length; i += 2) this.onBack(this.ghosts.values[i] * this.ghosts.scale, this.ghosts.values[i + 1] * this.ghosts.scale, dot, ghost);
      for (let i = 0; i < Math.min(spec.trails ?? 100, this.count); i++) if (!followed.has(i)) this.line(paths, i, disc(0.4 * ratio), this.faint);
      this.base = this.back.slice();
    }
    this.back.set(this.base);
    this.strong.fill(65535);
    const grey = (colour) => rgb(this.player.ink(colour));
    if (this.exact) for (const i of followed) this.line(this.exact, i, disc(2.2 * ratio), null);
    for (const i of followed) this.line(paths, i, disc(1.0 * ratio), this.strong, disc(2.6 * ratio));
    if (!this.player.drags()) return;
    const ring = disc(5 * ratio).filter(([x, y]) => Math.hypot(x, y) > 3 * ratio);
    for (const i of followed) this.onBack(paths.values[2 * i] * paths.scale, paths.values[2 * i + 1] * paths.scale, ring, grey(i === this.hand.chosen ? "#000000" : "#777777"));
    this.listen(context.canvas);
  }

  place(x, y) {
    return [Math.round(this.size / 2 + x * this.scale), Math.round(this.size / 2 - y * this.scale)];
  }

  // A ring is where a noise begins: the hand moves it, or the arrow keys once a digit has chosen one.
  listen(canvas) {
    const { hand, player, spec, paths } = this, at = (i) => [paths.values[2 * i] * paths.scale, paths.values[2 * i + 1] * paths.scale];
    canvas.tabIndex = 0;
    const where = (event) => {
      const box = canvas.getBoundingClientRect(), value = (place, from, size) => ((place - from) / size - 0.5) * 2 * spec.limit;
      return [value(event.clientX, box.left, box.width), -value(event.clientY, box.top, box.height)];
    };
    const nearest = (event) => {
      const [x, y] = where(event), far = (i) => Math.hypot(at(i)[0] - x, at(i)[1] - y), best = spec.followed.reduce((a, b) => (far(b) < far(a) ? b : a));
      return (far(best) * canvas.clientWidth) / (2 * spec.limit) < 24 ? best : -1;
    };
    const inside = (place) => place.map((value) => clamp(value, -spec.limit, spec.limit));
    canvas.ontouchstart = (event) => {
      if (nearest(event.touches[0]) >= 0) event.preventDefault(); // elsewhere the page scrolls: a handler that returns false would stop it
    };
    canvas.onpointerdown = (event) => {
      const best = nearest(event);
      if (event.button || best < 0) return;
      Object.assign(hand, { chosen: best, dragging: true });
      canvas.setPointerCapture(event.pointerId);
    };
    canvas.onpointermove = (event) => {
      canvas.style.cursor = hand.dragging ? "grabbing" : nearest(event) >= 0 ? "grab" : "";
      if (hand.dragging && event.buttons) player.moved(hand.chosen, inside(where(event)));
    };
    canvas.onpointerup = canvas.onpointercancel = () => {
      if (hand.dragging) player.settled();
      hand.dragging = false;
    };
    canvas.onkeydown = (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key], digit = parseInt(event.key, 10);
      if (event.altKey || event.ctrlKey || event.metaKey || !(step || (digit >= 1 && digit <= spec.followed.length))) return;
      event.preventDefault();
      event.stopPropagation();
      if (!step) return (hand.chosen = spec.followed[digit - 1]), player.again();
      player.moved(hand.chosen, inside(at(hand.chosen).map((value, k) => value + 0.05 * step[k])));
      player.settled();
    };
  }

  onBack(x, y, spots, colour) {
    const [px, py] = this.place(x, y);
    this.stamp(this.back, px, py, spots, colour);
  }

  // Thousands a picture: no array is made in here.
  stamp(pixels, px, py, spots, [r, g, b]) {
    const { size } = this, solid = packed([r, g, b]);
    for (let s = 0; s < spots.length; s++) {
      const spot = spots[s], x = px + spot[0], y = py + spot[1], cover = spot[2];
      if (x < 0 || y < 0 || x >= size || y >= size) continue;
      const where = y * size + x, old = pixels[where], left = 1 - cover;
      if (cover === 1) pixels[where] = solid;
      else pixels[where] = (255 << 24) | ((cover * b + left * ((old >> 16) & 255)) << 16) | ((cover * g + left * ((old >> 8) & 255)) << 8) | (cover * r + left * (old & 255));
    }
  }

  // The path of particle i into a buffer of first crossings, or (null) in grey onto the background; `knot` marks states.
  line(paths, i, spots, buffer, knot) {
    const { values, shape, scale } = paths, { size } = this, stride = shape[1] * 2;
    const times = buffer ? this.spec.times : new Array(shape[0]).fill(0), grey = rgb(this.player.ink("#a5a5a5"));
    const mark = (px, py, when, shape) => {
      if (!buffer) return this.stamp(this.back, px, py, shape, grey);
      for (let s = 0; s < shape.length; s++) {
        const spot = shape[s], x = px + spot[0], y = py + spot[1];
        if (spot[2] > 0.4 && x >= 0 && y >= 0 && x < size && y < size && buffer[y * size + x] > when) buffer[y * size + x] = when;
      }
    };
    for (let k = 0; k < shape[0]; k++) {
      const at = k * stride + 2 * i, when = Math.round(PROGRESS * this.player.progressOf(times[k]));
      const [x1, y1] = this.place(values[at] * scale, values[at + 1] * scale);
      if (knot && shape[0] <= 17) mark(x1, y1, when, knot);
      if (k + 1 === shape[0]) break;
      const [x2, y2] = this.place(values[at + stride] * scale, values[at + stride + 1] * scale);
      const next = Math.round(PROGRESS * this.player.progressOf(times[k + 1])), count = Math.max(1, Math.abs(x2 - x1), Math.abs(y2 - y1));
      if (count > 8 * size) continue; // far outside
      for (let j = 0; j <= count; j++) {
        const part = j / count;
        mark(Math.round(x1 + part * (x2 - x1)), Math.round(y1 + part * (y2 - y1)), Math.round(when + part * (next - when)), spots);
      }
    }
  }

  draw(at, progress, hash) {
    const { out, back, faint, strong, spec, size } = this, now = Math.round(PROGRESS * progress);
    const [paper, ink] = [rgb(this.player.ink("#ffffff")), rgb(this.player.ink("#000000"))];
    const trail = packed(this.colour.map((part, k) => Math.round(paper[k] + 0.42 * (part - paper[k])))), bold = packed(this.colour);
    for (let p = 0; p < out.length; p++) out[p] = strong[p] <= now ? bold : faint[p] <= now ? trail : back[p];
    const { values, shape, scale } = this.paths, stride = shape[1] * 2, [k, part] = locate(spec.times, at);
    const here = k * stride, next = Math.min(k + 1, shape[0] - 1) * stride, factor = scale * this.scale, middle = size / 2;
    const put = (i, spots, colour) => {
      const x = values[here + 2 * i], y = values[here + 2 * i + 1];
      const px = Math.round(middle + (x + part * (values[next + 2 * i] - x)) * factor);
      const py = Math.round(middle - (y + part * (values[next + 2 * i + 1] - y)) * factor);
      hash.add(px * 65536 + py);
      this.stamp(out, px, py, spots, colour);
    };
    for (let i = 0; i < this.count; i++) put(i, this.small, this.colour);
    for (const i of spec.followed || []) {
      put(i, this.rim, paper);
      put(i, this.large, ink);
    }
    this.context.putImageData(this.image, 0, 0);
    this.context.strokeStyle = this.player.ink("#cccccc");
    this.context.strokeRect(0.5, 0.5, size - 1, size - 1);
  }
}

// ---- pictures drawn with the canvas' own means; width and height in CSS pixels at the smallest size of text, 16

class Sketch {
  constructor(spec, player) {
    Object.assign(this, { spec, player });
  }

  prepare(context, width, ratio, height) {
    Object.assign(this, { context, ratio, width: width / ratio, height: height / ratio });
  }

  begin() {
    const { context, ratio } = this;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = this.player.ink("#ffffff");
    context.fillRect(0, 0, this.width, this.height);
    context.font = "16px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.lineWidth = 1;
    context.setLineDash([]);
  }

  text(words, x, y, align = "center", colour = "#1a1a1a", turn = 0, rim = null) {
    const { context } = this;
    context.save();
    context.translate(x, y);
    context.rotate(turn);
    context.textAlign = align;
    if (rim) {
      Object.assign(context, { strokeStyle: this.player.ink(rim), lineWidth: 5, lineJoin: "round" });
      context.strokeText(words, 0, 0);
    }
    context.fillStyle = this.player.ink(colour);
    context.fillText(words, 0, 0);
    context.restore();
  }

  later(x, y) {
    const { label, to } = this.player.axis;
    this.text(`shown at ${label} = ${to}`, x, y);
  }

  path(points, colour, width, dash = []) {
    const { context } = this;
    context.beginPath();
    points.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.strokeStyle = this.player.ink(colour);
    context.lineWidth = width;
    context.setLineDash(dash);
    context.stroke();
    context.setLineDash([]);
  }

  dot(x, y, radius, colour, rim = "#ffffff") {
    const { context } = this;
    context.beginPath();
    context.arc(x, y, radius, 0, 7);
    context.fillStyle = this.player.ink(colour);
    context.fill();
    context.lineWidth = 1.5;
    context.strokeStyle = this.player.ink(rim);
    context.stroke();
  }
}

// The triangle of times: a jump from t to r is the point (t, r); a path of jumps is a staircase below the diagonal.
class Triangle extends Sketch {
  static aspect = 1;

  // hand: the chain that is shown, which dot is chosen, whether it is held. It is the same object in the next drawing.
  constructor(spec, player, before) {
    super(spec, player);
    this.hand = before?.hand ?? { chain: [], chosen: 0, dragging: false };
    const { chain, dragging, chosen } = this.hand, kept = dragging && chain.length === spec.chain.length;
    if (!kept) Object.assign(this.hand, { chain: [...spec.chain], dragging: false, chosen: chosen < spec.chain.length - 1 ? chosen : 0 });
  }

  prepare(...arguments_) {
    super.prepare(...arguments_);
    const left = 68, bottom = 54, top = 26, right = 14;
    this.side = Math.min(this.width - left - right, this.height - top - bottom);
    this.x = (t) => left + t * this.side;
    this.y = (r) => top + (1 - r) * this.side;
    this.toTime = (px, py) => [(px - left) / this.side, 1 - (py - top) / this.side];
    if (this.spec.drag) this.listen(this.context.canvas);
  }

  listen(canvas) {
    const { hand } = this;
    canvas.classList.add("lm-drag");
    canvas.tabIndex = 0;
    canvas.setAttribute("aria-label", "jumps in the triangle of times: drag a dot; arrow keys move it, digits choose one");
    const where = (event) => {
      const box = canvas.getBoundingClientRect();
      return this.toTime(((event.clientX - box.left) * this.width) / box.width, ((event.clientY - box.top) * this.height) / box.height);
    };
    const release = () => {
      if (!hand.dragging) return;
      hand.dragging = false;
    };
    canvas.onpointerdown = (event) => {
      if (event.button) return;
      const [t, r] = where(event), far = (i) => Math.hypot(hand.chain[i] - t, hand.chain[i + 1] - r);
      hand.chosen = [...hand.chain.keys()].slice(0, -1).reduce((a, b) => (far(b) < far(a) ? b : a));
      canvas.setPointerCapture(event.pointerId);
      hand.dragging = true;
      this.move(t, r);
    };
    canvas.onpointermove = (event) => {
      if (!event.buttons) release();
      if (hand.dragging) this.move(...where(event));
    };
    canvas.onpointerup = canvas.onpointercancel = release;
    canvas.onkeydown = (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const step = 1 / this.spec.snap, [t, r] = hand.chain.slice(hand.chosen);
      const to = { ArrowLeft: [t - step, r], ArrowRight: [t + step, r], ArrowUp: [t, r + step], ArrowDown: [t, r - step] }[event.key];
      const digit = parseInt(event.key, 10);
      if (digit >= 1 && digit < hand.chain.length) hand.chosen = digit - 1;
      else if (!to) return;
      event.preventDefault();
      event.stopPropagation();
      if (to) this.move(...to);
      else this.player.dirty();
    };
  }

  // The chosen dot, i, is the jump from chain[i] to chain[i + 1]; both stay between their neighbours, on the grid.
  move(t, r) {
    const { chain, chosen: i } = this.hand, { snap } = this.spec, grid = (value) => Math.round(value * snap) / snap, least = 1 / snap;
    const before = chain.join();
    chain[i + 1] = clamp(grid(r), i + 2 < chain.length ? chain[i + 2] + least : 0, (i ? chain[i - 1] : 1) - (i ? 2 : 1) * least);
    chain[i] = clamp(grid(t), chain[i + 1] + least, i ? chain[i - 1] - least : 1);
    if (chain.join() !== before) this.player.picked([...chain]);
    this.player.dirty();
  }

  draw(at, progress, hash) {
    this.begin();
    const { x, y, spec } = this, { chain, chosen } = this.hand, { colour } = spec;
    this.path([[x(0), y(0)], [x(1), y(1)], [x(1), y(0)], [x(0), y(0)]], "#777777", 1.5);
    for (const tick of [0, 0.5, 1]) {
      this.text(String(tick), x(tick), y(0) + 22);
      this.text(String(tick), x(0) - 14, y(tick), "right");
    }
    this.text("from t (1 is noise)", x(0.5), y(0) + 42);
    this.text("to r", x(0) - 54, y(0.5), "center", "#1a1a1a", -Math.PI / 2);
    for (const [t, r] of spec.dots || []) this.dot(x(t), y(r), 4, "#999999");
    const stairs = [];
    for (let i = 0; i + 1 < chain.length; i++) stairs.push([x(chain[i]), y(chain[i])], [x(chain[i]), y(chain[i + 1])], [x(chain[i + 1]), y(chain[i + 1])]);
    this.path(stairs, colour, 2.5);
    if (at <= 1 && at >= 0) this.path([[x(at), y(0)], [x(at), y(at)]], "#000000", 1.5, [4, 4]);
    this.text("diffusion", x(0.34), y(0.34) - 16, "center", "#555555", -Math.PI / 4, "#ffffff");
    if (!spec.dots) this.text("consistency: r = 0", x(0.56), y(0) - 16, "center", "#555555", 0, "#ffffff");
    for (let i = 0; i + 1 < chain.length; i++) {
      this.dot(x(chain[i]), y(chain[i + 1]), spec.drag ? 10 : 7, colour, i === chosen && spec.drag ? "#000000" : "#ffffff");
      hash.add(Math.round(4096 * chain[i]) * 65536 + Math.round(4096 * chain[i + 1]));
    }
    hash.add(Math.round(1000 * at));
  }
}

// Paper to draw on. A stroke [x, y, x, y, ...] is handed on when the pen is lifted; `ghosts` are what was made of the strokes.
class Pen extends Sketch {
  static aspect = 1;

  constructor(spec, player, before) {
    super(spec, player);
    this.hand = before?.hand ?? {};
    if (!this.hand.down) this.hand.stroke = [];
  }

  prepare(...arguments_) {
    super.prepare(...arguments_);
    const { hand, spec, player } = this, { canvas } = this.context;
    const add = (event) => {
      const box = canvas.getBoundingClientRect(), value = (at, from, size) => clamp((at - from) / size - 0.5, -0.49, 0.49) * 2 * spec.limit;
      const [x, y] = [value(event.clientX, box.left, box.width), -value(event.clientY, box.top, box.height)];
      if (hand.stroke.length && Math.hypot(x - hand.stroke.at(-2), y - hand.stroke.at(-1)) < 0.03) return;
      hand.stroke.push(x, y);
      player.dirty();
    };
    canvas.classList.add("lm-pen");
    canvas.onpointerdown = (event) => {
      if (event.button) return;
      canvas.setPointerCapture(event.pointerId);
      Object.assign(hand, { down: true, stroke: [] });
      add(event);
    };
    canvas.onpointermove = (event) => hand.down && add(event);
    canvas.onpointerup = canvas.onpointercancel = () => hand.down && ((hand.down = false), player.stroke(hand.stroke));
  }

  draw(at, progress, hash) {
    this.begin();
    const { context, spec, width, hand } = this, place = (value, sign) => width / 2 + (sign * value * width) / (2 * spec.limit);
    const points = (line) => Array.from({ length: line.length / 2 }, (_, k) => [place(line[2 * k], 1), place(line[2 * k + 1], -1)]);
    context.strokeStyle = this.player.ink("#cccccc");
    context.strokeRect(0.5, 0.5, width - 1, width - 1);
    for (const [x, y] of points(spec.ghosts)) this.dot(x, y, 3.5, "#777777"), hash.add(Math.round(16 * x) * 65536 + Math.round(16 * y));
    this.path(points(hand.stroke), "#000000", 3);
    if (!spec.ghosts.length && !hand.stroke.length) this.text("draw a line here", width / 2, width / 2, "center", "#555555");
    hash.add(hand.stroke.length);
  }
}

// Lines or bars over time, with a cursor where we are; or, with a `span`, over what else there is.
class Chart extends Sketch {
  prepare(...arguments_) {
    super.prepare(...arguments_);
    const { spec, width, height } = this, [low, high] = spec.limits, [from, to] = spec.span ?? [this.player.axis.from, this.player.axis.to];
    const left = 64, right = 12, top = 12 + 20 * (spec.lines || []).filter((line) => line.label).length, bottom = 46;
    const squash = spec.log ? Math.log : (value) => value;
    this.box = [left, top, width - right, height - bottom];
    this.x = (time) => left + ((time - from) / (to - from)) * (width - left - right);
    this.y = (value) => top + (1 - (squash(clamp(value, low, high)) - squash(low)) / (squash(high) - squash(low))) * (height - top - bottom);
  }

  draw(at, progress, hash) {
    this.begin();
    const { spec, x, y, context } = this, [left, top, right, bottom] = this.box;
    for (const tick of spec.ticks) {
      this.path([[left, y(tick)], [right, y(tick)]], "#dddddd", 1);
      this.text(String(tick), left - 8, y(tick), "right");
    }
    for (const tick of spec.times) this.text(String(tick), x(tick), bottom + 14);
    this.text(spec.xlabel, (left + right) / 2, bottom + 34);
    this.path([[left, top], [left, bottom], [right, bottom]], "#777777", 1);
    const shown = this.player.seen(), bars = spec.history?.[Math.round(at)] || spec.bars || [];
    if (!shown) this.later((left + right) / 2, (top + bottom) / 2);
    for (const { from, to, height, colour } of shown ? bars : []) {
      const [a, b] = [x(from), x(to)].sort((one, other) => one - other);
      Object.assign(context, { fillStyle: this.player.ink(colour), strokeStyle: this.player.ink(colour.slice(0, 7)), lineWidth: 2 }); // a rim shows through others
      context.fillRect(a + 1, y(height), Math.max(2, b - a - 2), bottom - y(height));
      if (colour.length > 7) context.strokeRect(a + 1, y(height), Math.max(2, b - a - 2), bottom - y(height));
      hash.add(Math.round(y(height)));
    }
    let row = 0;
    for (const { points, times, colour, dash, label } of spec.lines || []) {
      const { values, scale } = points;
      if (shown) this.path(times.map((time, k) => [x(time), y(values[k] * scale)]), colour, 2.5, dash || []);
      values.forEach((value) => hash.add(value));
      if (label) {
        this.path([[left + 6, 14 + 20 * row], [left + 40, 14 + 20 * row]], colour, 3, dash || []);
        this.text(label, left + 48, 14 + 20 * row++, "left");
      }
    }
    if (!spec.span) this.path([[x(at), top], [x(at), bottom]], "#000000", 1.5, [4, 4]), hash.add(Math.round(x(at)));
  }
}

// A measure against the number of steps, both in powers, in a band of its scatter; a dot where the scene is.
class Curve extends Sketch {
  draw(at, progress, hash) {
    this.begin();
    const { spec, width, height } = this, [low, high] = spec.limits, [left, top, right, bottom] = [50, 10, width - 12, height - 46], last = Math.log2(spec.steps.at(-1));
    const x = (steps) => left + 8 + (Math.log2(steps) / last) * (right - left - 16), y = (value) => bottom - (Math.log(clamp(value, low, high) / low) / Math.log(high / low)) * (bottom - top);
    for (const tick of spec.ticks) {
      this.path([[left, y(tick)], [right, y(tick)]], "#dddddd", 1);
      this.text(String(tick), left - 6, y(tick), "right");
    }
    spec.steps.forEach((steps, k) => (k % 2 && width < 300) || this.text(String(steps), x(steps), bottom + 14));
    this.text("steps", (left + right) / 2, bottom + 34);
    this.path([[x(spec.at), top], [x(spec.at), bottom]], "#777777", 1.5, [4, 4]);
    this.path([[left, top], [left, bottom], [right, bottom]], "#777777", 1);
    if (!this.player.seen()) return this.later((left + right) / 2, (top + bottom) / 2);
    for (const { colour, places } of spec.lines) {
      const edge = (sign) => places.map(([steps, value, scatter]) => [x(steps), y(value + sign * scatter)]), { context } = this;
      context.beginPath();
      [...edge(1), ...edge(-1).reverse()].forEach((point) => context.lineTo(...point));
      context.fillStyle = this.player.ink(`${colour}40`);
      context.fill();
      this.path(places.map(([steps, value]) => [x(steps), y(value)]), colour, 2.5);
      for (const [steps, value] of places) {
        if (steps === spec.at) this.dot(x(steps), y(value), 6, colour);
        hash.add(Math.round(y(value)));
      }
    }
    hash.add(spec.at);
  }
}

// Clips playing, side by side: an array (clips, frames, height, width) of greys; `first`: the number of its first frame.
class Video extends Sketch {
  static aspect(spec) {
    const [clips, , height, width] = spec.clips.shape;
    return height / (clips * (width + 1) - 1);
  }

  draw(at, progress, hash) {
    this.begin();
    const { values, shape } = this.spec.clips, [clips, frames, height, width] = shape;
    const frame = clamp(Math.floor(at - (this.spec.first ?? 0) + 1e-6), 0, frames - 1), { context } = this;
    const small = (this.small ??= new OffscreenCanvas(width, height)), pen = small.getContext("2d"), image = pen.createImageData(width, height);
    context.imageSmoothingEnabled = false;
    for (let clip = 0; clip < clips; clip++) {
      const start = (clip * frames + frame) * height * width;
      for (let p = 0; p < height * width; p++) {
        const grey = values[start + p];
        image.data.set([grey, grey, grey, 255], 4 * p);
        hash.add(grey);
      }
      pen.putImageData(image, 0, 0);
      const pixel = this.width / (clips * (width + 1) - 1); // one of them between the clips
      context.drawImage(small, clip * (width + 1) * pixel, 0, width * pixel, this.height);
    }
  }
}

const KINDS = { plane: Plane, pen: Pen, triangle: Triangle, chart: Chart, curve: Curve, video: Video };

class Hash {
  constructor() {
    this.value = 2166136261;
  }
  add(number) {
    this.value = Math.imul(this.value ^ number, 16777619);
  }
}

function make(kind, parent, name, words) {
  const element = parent.appendChild(document.createElement(kind));
  if (name) element.className = name;
  if (words) element.textContent = words;
  return element;
}

const DARK = { // what a colour becomes on dark paper
  "#ffffff": "#14171b", "#000000": "#f2f2f2", "#1a1a1a": "#e6e6e6", "#444444": "#bbbbbb", "#555555": "#aaaaaa", "#777777": "#8a8a8a", "#969696": "#666666",
  "#a5a5a5": "#6d7278", "#c8c8c8": "#4a4f55", "#cccccc": "#50565c", "#dddddd": "#353b41", "#882255": "#a98bf0", "#0072b2": "#4aa3dc",
};

/** Draw a scene into `element`. options: onPick(chain), a dot of the triangle was moved; onMove(i, place), a noise; onSettle(),
 *  it was let go; onStroke(line), a line was drawn; onPress(values), a button of the scene; onEnd(), a stream is played to the
 *  end of its chunk. Returns { update(scene), seek(position), play(), playing(), pause(), destroy(), again(), guarded(work), root }. */
export function mountPlayer(element, content, options = {}) {
  const root = make("div", element, "lm-player");
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true"; // or JupyterLab takes the arrow keys
  root.dataset.frames = "0";
  const problem = make("div", root, "lm-error");
  problem.hidden = true;
  const actions = make("div", root, "lm-bar"), panels = make("div", root, "lm-panels"), bar = make("div", root, "lm-bar");
  const button = make("button", bar, "", "Play"), range = make("input", bar), clock = make("output", bar), note = make("p", root, "lm-note");
  button.type = "button";
  Object.assign(range, { type: "range", min: 0, max: 1, step: "any", value: 1 });
  range.setAttribute("aria-label", "time");
  range.dataset.lmSuppressShortcuts = "true";

  let parts = [], scene = null, position = 0, waiting = 0, playing = 0, frames = 0, serial = 0, theme = "";

  const player = {
    axis: null,
    progressOf: (at) => clamp((at - player.axis.from) / (player.axis.to - player.axis.from || 1), 0, 1),
    dirty: () => (waiting ||= requestAnimationFrame(guarded(draw))),
    picked: (chain) => options.onPick?.(chain),
    seen: () => root.dataset.seen === "1",
    drags: () => Boolean(scene?.drag),
    stirred: false, // a noise was moved since the last scene
    moved: (i, place) => ((player.stirred = true), options.onMove?.(i, place)),
    settled: () => options.onSettle?.(),
    stroke: (line) => options.onStroke?.(line),
    ink: (colour) => (theme === "dark" ? (DARK[colour.slice(0, 7).toLowerCase()] ?? colour.slice(0, 7)) + colour.slice(7) : colour),
    again: () => (parts.forEach((part) => (part.size = 0)), player.dirty()),
  };

  function guarded(work) {
    return (...arguments_) => {
      try {
        return work(...arguments_);
      } catch (error) {
        waiting = 0;
        problem.hidden = false;
        problem.textContent = `this picture could not be drawn: ${error.message}`;
        root.dataset.error = error.message;
        reportError(error);
      }
    };
  }

  function draw() {
    waiting = 0;
    if (!scene || !panels.clientWidth) return;
    const ratio = window.devicePixelRatio || 1, hash = new Hash(), look = getComputedStyle(root).getPropertyValue("--lm-theme").trim();
    if (look !== theme) (theme = look), parts.forEach((part) => (part.size = 0));
    const unit = parseFloat(getComputedStyle(root).fontSize) / SMALLEST; // what is drawn grows with the words around it
    if (position >= 1 || !scene.hides) root.dataset.seen = "1"; // a prediction comes before its answer
    const at = player.axis.from + position * (player.axis.to - player.axis.from);
    for (const part of parts) {
      const wide = part.canvas.clientWidth, size = Math.max(1, Math.round(wide * ratio));
      if (part.size !== size || part.ratio !== ratio || part.unit !== unit) {
        const tall = Math.max(1, Math.round(size * part.aspect));
        if (part.canvas.width !== size || part.canvas.height !== tall) Object.assign(part.canvas, { width: size, height: tall });
        part.canvas.style.aspectRatio = `${size} / ${tall}`;
        part.drawing.prepare(part.canvas.getContext("2d", { willReadFrequently: true }), size, ratio * unit, tall);
        Object.assign(part, { size, ratio, unit });
      }
      part.drawing.draw(at, position, hash);
    }
    clock.textContent = `${player.axis.label} = ${at.toFixed(player.axis.digits)}`;
    if (document.activeElement !== range || Math.abs(range.value - position) > 1e-3) range.value = position;
    frames += 1;
    const seen = { ready: "1", frames, drawn: (hash.value >>> 0).toString(16), position: position.toFixed(4), serial };
    Object.assign(root.dataset, seen);
  }

  function update(next) {
    problem.hidden = true;
    delete root.dataset.error;
    player.axis = next.axis;
    const old = parts, same = old.length === next.panels.length && old.every((part, k) => part.kind === next.panels[k].kind);
    if (!same) panels.replaceChildren();
    root.style.setProperty("--lm-columns", next.columns || next.panels.length);
    parts = next.panels.map((spec, k) => {
      const Kind = KINDS[spec.kind];
      if (!Kind) throw new Error(`a panel of kind ${spec.kind}; known: ${Object.keys(KINDS).join(", ")}`);
      const figure = same ? old[k].figure : make("figure", panels);
      figure.dataset.kind = spec.kind;
      const [title, canvas, table] = same ? figure.children : [make("figcaption", figure), make("canvas", figure), make("div", figure, "lm-measures")];
      title.textContent = spec.title;
      title.style.color = spec.ink || "";
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", [spec.title, ...Object.entries(spec.measures || {}).map((pair) => pair.join(" "))].join(", "));
      table.replaceChildren();
      for (const [name, value] of Object.entries(spec.measures || {})) make("span", table, "", name), make("b", table, "", value);
      const aspect = typeof Kind.aspect === "function" ? Kind.aspect(spec) : spec.aspect || Kind.aspect;
      canvas.style.aspectRatio = `1 / ${aspect}`;
      const drawing = new Kind(spec, player, same ? old[k].drawing : null);
      return { kind: spec.kind, figure, canvas, drawing, aspect };
    });
    const wanted = next.buttons ?? [];
    actions.hidden = !wanted.length;
    if (String([...actions.children].map((old) => old.textContent)) !== String(wanted.map(([words]) => words))) {
      actions.replaceChildren();
      wanted.forEach(([words], k) => Object.assign(make("button", actions, "", words), { type: "button", onclick: () => options.onPress?.(scene.buttons[k][1]) }));
    }
    player.stirred = false;
    note.textContent = next.note || "";
    note.hidden = !next.note;
    if (scene === null) position = next.position ?? 0;
    scene = next;
    serial += 1;
    player.dirty();
  }

  function seek(to) {
    position = clamp(to, 0, 1);
    player.dirty();
  }

  function pause() {
    cancelAnimationFrame(playing);
    playing = 0;
    button.textContent = "Play";
  }

  function play() {
    if (position >= 1) position = 0;
    let last = performance.now();
    const length = scene?.duration || PLAYING;
    button.textContent = "Pause";
    const go = (now) => {
      seek(position + Math.max(0, now - last) / length);
      last = now;
      if (position >= 1 && scene?.loop) position = 0;
      if (scene?.stream) options.onEnd?.(position >= 1);
      if (position >= 1 && !scene?.stream) pause();
      else playing = requestAnimationFrame(go);
    };
    cancelAnimationFrame(playing);
    playing = requestAnimationFrame(go);
  }

  // One stop on: the states of the picture with the most of them.
  function step(way) {
    const stops = scene.axis.stops.map(player.progressOf);
    const next = way > 0 ? stops.find((stop) => stop > position + 1e-6) : stops.findLast((stop) => stop < position - 1e-6);
    seek(next ?? (way > 0 ? 1 : 0));
  }

  button.onclick = () => (playing ? pause() : play());
  range.oninput = () => (pause(), seek(Number(range.value)));
  root.addEventListener("keydown", (event) => {
    const does = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => seek(0), End: () => seek(1), " ": () => button.onclick() }[event.key];
    if (!does || (event.key === " " && event.target === button) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key !== " ") pause();
    does();
  });

  const watch = new ResizeObserver(() => player.dirty()), looks = new MutationObserver(() => player.dirty()), wish = matchMedia("(prefers-color-scheme: dark)");
  watch.observe(panels);
  for (const part of [document.documentElement, document.body]) looks.observe(part, { attributeFilter: ["data-theme", "data-jp-theme-light"] });
  wish.addEventListener("change", player.dirty);
  if (content) guarded(update)(content);
  const destroy = () => {
    pause();
    watch.disconnect();
    looks.disconnect();
    wish.removeEventListener("change", player.dirty);
    cancelAnimationFrame(waiting);
    root.remove();
  };
  return { update: guarded(update), seek, play, playing: () => Boolean(playing), pause, destroy, again: player.again, guarded, root };
}

/** Controls above a player. page: { kind, title, state, controls: [{ name, label, values, labels, slider, below }], data or scenes };
 *  `below` names a control whose value a slider stays under. A scene of a kind in COMPUTED is computed here; of another
 *  `page.scenes[key]`, key: the chosen values joined by "|", is shown, or ask(state) is called, for `show` later. */
export function mountScene(element, page, payload, ask = () => {}, changed = () => {}) {
  const root = make("div", element, "lm-scene"), row = make("div", root, "lm-choices"), state = { ...page.state }, inputs = {};
  let work = null, shown = null, world = null, next = null, asked = false, told = 0; // next: the chunk of a stream that came meanwhile
  const player = mountPlayer(root, null, { onPick: pick, onMove: (i, place) => (world.drag(i, place, new Set(shown.paths)), player.again()), onSettle: refresh, onStroke, onPress: set, onEnd });
  for (const { name, label, values, labels, slider } of page.controls) {
    const box = make("label", row, "", label), input = make(slider ? "input" : "select", box), shows = slider ? make("output", box) : null;
    input.name = name;
    input.dataset.lmSuppressShortcuts = "true";
    if (slider) Object.assign(input, { type: "range", min: 0, max: values.length - 1, step: 1 });
    else values.forEach((value, k) => (make("option", input, "", String(labels[k])).value = k));
    inputs[name] = (value) => {
      const index = values.indexOf(value);
      input.value = index;
      if (shows) (shows.textContent = labels[index]), input.setAttribute("aria-valuetext", labels[index]);
    };
    input.oninput = () => {
      state[name] = values[Number(input.value)];
      if (["jumps", "start", "target"].includes(name)) state.chain = null; // evenly spaced again
      refresh();
    };
  }
  function set(values) {
    Object.assign(state, values);
    refresh();
  }
  function onStroke(line) {
    set({ strokes: [...(state.target === "your own" ? (state.strokes ?? []) : []), line], target: "your own" });
  }
  function pick(chain) {
    set({ chain, start: chain[0], target: chain.at(-1) });
  }
  // A stream asks for one chunk ahead; the controls of that moment are its own.
  function onEnd(reached) {
    if (reached && next) (show(...next), player.seek(0), (next = null));
    if (next || asked) return;
    asked = true;
    ask({ ...state, chunk: (state.chunk = (state.chunk ?? 0) + 1) });
  }
  function arrive(scene, bytes) {
    asked = false;
    if (scene.stream && player.playing()) next = [scene, bytes];
    else show(scene, bytes);
  }
  function refresh() {
    if (shown?.stream && !player.playing()) state.chunk = (state.chunk ?? 0) + 1; // it is seen at once
    for (const { name, below, values } of page.controls)
      if (below) {
        const input = row.querySelector(`[name="${name}"]`);
        input.max = values.findLastIndex((value) => value < state[below]);
        state[name] = values[Math.min(input.max, values.indexOf(state[name]))];
      }
    for (const name in inputs) inputs[name](state[name]);
    clearTimeout(told);
    if (world) told = setTimeout(changed, 100, { ...state }); // the picture first, then the kernel
    else changed({ ...state });
    const held = page.scenes?.[page.controls.map(({ name }) => state[name]).join("|")];
    if (held) show(held, payload);
    else if (!world) player.guarded(ask)({ ...state });
    else {
      const mine = (work = COMPUTED[page.kind](world, state));
      const go = player.guarded(() => {
        if (work !== mine) return;
        const { value, done } = mine.next();
        if (value instanceof Promise) return void value.then(go); // of what it waits for
        if (value) player.update((shown = world.slow ? { ...value, note: `${value.note} ${world.slow}` } : value));
        player.root.dataset.done = done ? "1" : "";
        if (!done) setTimeout(go);
      });
      go();
    }
  }
  const show = player.guarded((scene, bytes) => {
    if (scene.error) throw new Error(scene.error);
    player.update((shown = filled(scene, unpack(scene, bytes))));
    player.root.dataset.done = "1";
  });
  player.guarded(() => {
    if (page.kind in COMPUTED) world = new World({ ...page, data: filled(page.data, unpack(page, payload)) });
    refresh();
  })();
  const destroy = () => (clearTimeout(told), (work = null), world?.dismiss(), player.destroy());
  return { ...player, destroy, show, arrive, state, world, shown: () => shown, set };
}

/** The widget: the kernel is asked for nothing but pictures of scenes that the page cannot compute. */
function render({ model, el }) {
  const changed = (state) => (model.set("state", state), model.save_changes());
  let gone = false; // a restarted kernel knows this scene no more
  const ask = (state) => {
    if (gone) throw new Error("the kernel was started anew; run this cell again");
    changed(state);
  };
  const left = () => (gone = true);
  const scene = mountScene(el, model.get("page"), model.get("payload"), ask, (state) => gone || changed(state));
  const show = () => model.get("picture")?.byteLength && scene.arrive(model.get("shown"), model.get("picture"));
  model.on("change:shown", show);
  model.on("comm_live_update", left);
  show();
  return () => {
    model.off("change:shown", show);
    model.off("comm_live_update", left);
    scene.destroy();
  };
}

export default { render };

// The map's picture: a dot per chunk, which can be zoomed, moved and walked through, with a card for the chosen one.

const NAMED = 12; // Partitions with a color of their own: 8 colors, the first 4 once more as squares.
const COLORS = 8;
const REACH = 16; // Pixels from the pointer to a dot.
const MARGIN = 18; // Pixels around the dots.
const CLOSEST = 40; // Largest scale.

/** Groups of points, largest partition first; the last one may be all the others. */
function groupsOf(points) {
  const byKey = new Map();
  for (const point of points) {
    if (!byKey.has(point.partition_key)) byKey.set(point.partition_key, []);
    byKey.get(point.partition_key).push(point);
  }
  const sorted = [...byKey].sort((a, b) => b[1].length - a[1].length || a[0].localeCompare(b[0]));
  const groups = sorted.slice(0, NAMED).map(([name, members], i) => ({
    name,
    members,
    kind: `c${i % COLORS}${i < COLORS ? "" : " square"}`,
  }));
  const others = sorted.slice(NAMED);
  if (others.length) {
    const members = others.flatMap((entry) => entry[1]);
    groups.push({ name: plural(others.length, "other partition"), members, kind: "others" });
  }
  for (const group of groups) for (const point of group.members) point.group = group;
  return groups;
}

/** Lay points out in a box of pixels: both axes are stretched to fill it. */
function layOut(points, width, height) {
  const ends = (axis) =>
    points.reduce(([low, high], p) => [Math.min(low, p[axis]), Math.max(high, p[axis])], [Infinity, -Infinity]);
  const [left, right] = ends("x"),
    [bottom, top] = ends("y");
  for (const p of points) {
    p.left = MARGIN + (width - 2 * MARGIN) * (right > left ? (p.x - left) / (right - left) : 0.5);
    p.top = MARGIN + (height - 2 * MARGIN) * (top > bottom ? (top - p.y) / (top - bottom) : 0.5);
  }
}

/** One path for many dots: a stroke of no length with round ends is a dot, and keeps its size in a zoomed picture. */
const dots = (points) => points.map((p) => `M${p.left.toFixed(1)} ${p.top.toFixed(1)}h.01`).join("");

class VectorMap {
  constructor(points) {
    Object.assign(this, {
      points,
      listed: points,
      groups: groupsOf(points),
      hidden: new Set(),
      wanted: "",
      changed: () => {},
    });
    Object.assign(this, { scale: 1, x: 0, y: 0, width: 0, height: 0, chosen: null, isPinned: false, drag: null });
    this.paths = new Map(this.groups.map((group) => [group, svg("path", { class: `dots ${group.kind}` })]));
    [this.rest, this.halo, this.spot] = ["rest", "halo", "spot"].map((kind) => svg(`path.dots.${kind}`));
    this.scene = svg("g", this.rest, [...this.paths.values()], this.halo, this.spot);
    const label =
      `Map of ${plural(points.length, "chunk")}. Arrow keys go from dot to dot, plus and minus zoom, ` +
      "Escape closes the card. The table below has the same chunks.";
    const role = { role: "application", "aria-roledescription": "map", "aria-label": label };
    this.picture = svg("svg.map", { tabindex: 0, ...role }, this.scene);
    this.card = el("div.card", { "aria-live": "polite", hidden: true });
    this.frame = el("div.frame", this.picture, this.card, this.zoomButtons());
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.frame);
  }

  has(point, word) {
    const texts = [point.text, point.title, point.heading_path, point.document_id];
    return texts.some((text) => text.toLowerCase().includes(word));
  }

  /** Draw all dots for the size that the frame has. */
  draw() {
    const { clientWidth, clientHeight } = this.frame;
    if (!clientWidth || (clientWidth === this.width && clientHeight === this.height)) return;
    Object.assign(this, { width: clientWidth, height: clientHeight });
    this.picture.setAttribute("viewBox", `0 0 ${clientWidth} ${clientHeight}`);
    layOut(this.points, clientWidth, clientHeight);
    this.move(this.x, this.y);
    this.mark();
    this.outline();
  }

  /** Draw the dots that are not hidden: faint are those without the word that is looked for. */
  mark() {
    const visible = this.points.filter((point) => !this.hidden.has(point.group));
    this.listed = this.wanted ? visible.filter((point) => this.has(point, this.wanted)) : visible;
    const listed = new Set(this.listed);
    this.picture.classList.toggle("searched", this.wanted !== "");
    this.rest.setAttribute("d", dots(visible.filter((point) => !listed.has(point))));
    for (const [group, path] of this.paths) path.setAttribute("d", dots(group.members.filter((p) => listed.has(p))));
    if (this.chosen && !listed.has(this.chosen)) this.choose(null);
    this.changed();
  }

  /** Scale the picture, and move it so that no side of it is empty. */
  move(x, y, scale = this.scale) {
    const within = (at, length) => Math.min(0, Math.max(at, length * (1 - scale)));
    Object.assign(this, { scale, x: within(x, this.width), y: within(y, this.height) });
    this.scene.setAttribute("transform", `translate(${this.x} ${this.y}) scale(${scale})`);
    this.frame.classList.toggle("zoomed", scale > 1);
    this.place();
  }

  /** Zoom around a place, by default the middle. */
  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const scale = Math.max(1, Math.min(this.scale * factor, CLOSEST)),
      ratio = scale / this.scale;
    this.move(x - (x - this.x) * ratio, y - (y - this.y) * ratio, scale);
  }

  /** Where a point is in the frame. */
  spotOf(point) {
    return [point.left * this.scale + this.x, point.top * this.scale + this.y];
  }

  /** The listed point with the least `measure` of its place, if that is below `limit`. */
  least(measure, limit) {
    let best = null;
    for (const point of this.listed) {
      const value = measure(...this.spotOf(point));
      if (value < limit) [best, limit] = [point, value];
    }
    return best;
  }

  nearest(x, y) {
    return this.least((a, b) => Math.hypot(a - x, b - y), REACH);
  }

  /** Go to the nearest dot in a direction. */
  step(dx, dy) {
    const [x, y] = this.chosen ? this.spotOf(this.chosen) : [this.width / 2, this.height / 2];
    const next = this.least((a, b) => {
      const along = (a - x) * dx + (b - y) * dy;
      return along > 0.5 ? along + 2 * Math.abs((a - x) * dy + (b - y) * dx) : Infinity;
    }, Infinity);
    if (!next) return;
    const [a, b] = this.spotOf(next),
      inside = (at, length) => Math.max(20 - at, 0) - Math.max(at - length + 20, 0);
    this.choose(next, true);
    this.move(this.x + inside(a, this.width), this.y + inside(b, this.height));
  }

  /** Show a point's card, or none; a pinned one stays when the pointer moves on. */
  choose(point, isPinned = false) {
    this.isPinned = isPinned && point !== null;
    this.frame.classList.toggle("pinned", this.isPinned);
    if (point !== this.chosen) {
      this.chosen = point;
      this.card.replaceChildren(...(point ? passage(point).filter(Boolean) : []));
      this.card.hidden = !point;
      this.outline();
    }
    this.place();
  }

  outline() {
    const point = this.chosen;
    for (const path of [this.halo, this.spot]) path.setAttribute("d", point ? dots([point]) : "");
    if (point) this.spot.setAttribute("class", `dots spot ${point.group.kind}`);
  }

  /** Put the card beside its dot. */
  place() {
    if (!this.chosen) return;
    const [x, y] = this.spotOf(this.chosen),
      { offsetWidth, offsetHeight, style } = this.card;
    const left = x + 14 + offsetWidth <= this.width ? x + 14 : x - 14 - offsetWidth;
    style.left = `${Math.max(4, Math.min(left, this.width - offsetWidth - 4))}px`;
    style.top = `${Math.max(4, Math.min(y - 20, this.height - offsetHeight - 4))}px`;
  }

  zoomButtons() {
    const control = (text, label, act) => button("button", text, act, { title: label, "aria-label": label });
    return el(
      "div.zoom",
      control("+", "Zoom in", () => this.zoom(1.6)),
      control("−", "Zoom out", () => this.zoom(1 / 1.6)),
      control("⤢", "Show the whole map", () => this.move(0, 0, 1)),
    );
  }

  listen() {
    const on = (event, act, options) => this.picture.addEventListener(event, act, options);
    const at = (event) => {
      const box = this.picture.getBoundingClientRect();
      return [event.clientX - box.x, event.clientY - box.y];
    };
    on("keydown", (event) => this.press(event));
    on("pointerdown", (event) => {
      this.drag = { from: at(event), x: this.x, y: this.y, isMoved: false };
    });
    on("pointermove", (event) => this.point(event, ...at(event)));
    on("pointerup", (event) => {
      if (this.drag && !this.drag.isMoved) this.choose(this.nearest(...at(event)), true);
      this.drag = null;
    });
    on("pointerleave", () => {
      this.drag = null;
      if (!this.isPinned) this.choose(null);
    });
    on("wheel", (event) => this.wheel(event, ...at(event)), { passive: false });
  }

  /** The pointer has moved: drag the picture, or show what is below the pointer. */
  point(event, x, y) {
    const drag = this.drag;
    if (drag && this.scale > 1) {
      const [dx, dy] = [x - drag.from[0], y - drag.from[1]];
      if (!drag.isMoved && Math.hypot(dx, dy) < 4) return;
      drag.isMoved = true;
      this.picture.setPointerCapture(event.pointerId);
      this.move(drag.x + dx, drag.y + dy);
    } else if (!this.isPinned) {
      this.choose(this.nearest(x, y));
    }
  }

  /** Zoom only with a modifier key, as pinching gives it: the wheel alone scrolls the page. */
  wheel(event, x, y) {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY / 200), x, y);
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const zooms = { "+": 1.5, "=": 1.5, "-": 1 / 1.5 };
    if (steps[event.key]) this.step(...steps[event.key]);
    else if (zooms[event.key]) this.zoom(zooms[event.key]);
    else if (event.key === "Escape") this.choose(null);
    else return;
    event.preventDefault();
  }
}

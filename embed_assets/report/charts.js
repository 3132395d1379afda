// Pictures in SVG. Each is drawn at the width that it has, and again when that changes.

/** A box that `draw(width)` fills with the content of a picture; `words` say what it shows. */
function chart(words, height, draw) {
  const box = el("div.chart");
  let drawn = 0;
  const redraw = () => {
    const width = Math.round(box.clientWidth);
    if (!width || width === drawn) return;
    drawn = width;
    const size = { viewBox: `0 0 ${width} ${height}`, width, height };
    box.replaceChildren(svg("svg", { ...size, role: "img", "aria-label": words }, draw(width)));
  };
  new ResizeObserver(redraw).observe(box);
  return box;
}

/** About `count` round numbers from `low` to `high`. */
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9),
    last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

const short = (value) => (Math.abs(value) >= 1e6 ? `${number(value / 1e6, 3)} M` : number(value, 6));
const line = (kind, x1, y1, x2, y2) => svg(`line.${kind}`, { x1, y1, x2, y2 });
const bar = (kind, x, y, width, height) => svg(`rect.${kind}`, { x, y, width, height });
const label = (text, x, y, anchor = "middle", kind = "tick") =>
  svg(`text.${kind}`, { x, y, "text-anchor": anchor }, text);

/** Lines across an area with their numbers, from 0 to `top`. */
function grid(area, top, show = short) {
  return ticks(0, top, 3).map((value) => {
    const y = area.bottom - ((area.bottom - area.top) * value) / top;
    return [
      line(value ? "grid" : "axis", area.left, y, area.right, y),
      label(show(value), area.left - 8, y + 4, "end"),
    ];
  });
}

/** A histogram with lines at its median and its limits. */
function histogram(data, unit) {
  const median = { value: data.median, label: `median ${number(data.median)}`, kind: "median" };
  const limits = data.limits.map((limit) => ({ ...limit, kind: "limit" }));
  const marks = [median, ...limits].filter((mark) => mark.value >= data.low && mark.value <= data.high);
  const words = `Histogram of ${unit}: ${[median, ...limits].map((mark) => mark.label).join(", ")}`;
  const height = 210 + 18 * marks.length;
  return chart(words, height, (width) => {
    const area = { left: 52, right: width - 22, top: 12 + 18 * marks.length, bottom: height - 40 };
    const middle = (area.left + area.right) / 2;
    const x = (value) => area.left + ((area.right - area.left) * (value - data.low)) / (data.high - data.low || 1);
    const below = ticks(data.low, data.high, Math.min(6, width / 90));
    const lines = marks.map((mark, i) => {
      const at = x(mark.value),
        y = 12 + 18 * i,
        isRight = at > middle;
      const text = label(mark.label, at + (isRight ? -6 : 6), y + 2, isRight ? "end" : "start", mark.kind);
      return [line(mark.kind, at, y - 8, at, area.bottom), text];
    });
    const numbers = below.map((value) => label(number(value, digits(data)), x(value), area.bottom + 18));
    return [grid(area, tallest(data)), histogramBars(data, area), lines, numbers, label(unit, middle, height - 4)];
  });
}

/** Significant digits that tell a histogram's ticks apart. */
function digits(data) {
  const largest = Math.max(Math.abs(data.low), Math.abs(data.high));
  return Math.max(5, Math.ceil(Math.log10(largest / (data.high - data.low || largest || 1))) + 2);
}

const tallest = (data) => Math.max(...data.counts, 1);

function histogramBars(data, area) {
  const step = (area.right - area.left) / data.counts.length,
    gap = step > 5 ? 1 : 0;
  const end = (i) => number(data.low + ((data.high - data.low) * i) / data.counts.length, digits(data));
  return data.counts.map((count, i) => {
    if (!count) return null;
    const height = Math.max(((area.bottom - area.top) * count) / tallest(data), 1);
    const made = bar("fill", area.left + i * step + gap / 2, area.bottom - height, Math.max(step - gap, 0.5), height);
    return tipped(made, `${end(i)} to ${end(i + 1)}: ${plural(count, "chunk")}`);
  });
}

/** Runs from left to right: how much of each was reused, and how fast it was. */
function runCharts(rows) {
  const top = Math.max(...rows.map((run) => run.tokens_per_second ?? 0), 1);
  const keys = [el("span.key.fill"), "embedded", el("span.key.kept"), "reused"];
  return el(
    "div.pair",
    el(
      "figure",
      el("figcaption", "Chunks per run", keys),
      runChart("Share of chunks reused", rows, 1, percent, reuseBars),
    ),
    el("figure", el("figcaption", "Tokens per second"), runChart("Tokens per second", rows, top, short, speedBar)),
  );
}

/** A chart with a column per run; `draw` makes a run's bars, given its place. */
function runChart(words, rows, top, show, draw) {
  return chart(`${words}, by run`, 166, (width) => {
    const area = { left: 60, right: width - 12, top: 14, bottom: 136 };
    const step = Math.min((area.right - area.left) / rows.length, 72),
      wide = Math.max(Math.min(step - 4, 40), 1);
    const every = Math.ceil(80 / step);
    const middle = (i) => area.left + step * (i + 0.5);
    const dates = rows.map((run, i) => (i % every ? null : label(day(run.started_at), middle(i), area.bottom + 18)));
    const bars = rows.map((run, i) =>
      draw(run, { ...area, x: middle(i) - wide / 2, wide, tall: area.bottom - area.top, top }),
    );
    return [grid(area, top, show), bars, dates];
  });
}

function reuseBars(run, { x, wide, tall, bottom }) {
  const share = run.reused / (run.embedded + run.reused || 1),
    kept = tall * share;
  const bars = svg("g", bar("fill", x, bottom - tall, wide, tall - kept), bar("kept", x, bottom - kept, wide, kept));
  const counts = `${whole(run.embedded)} embedded, ${whole(run.reused)} reused`;
  return tipped(bars, `${minute(run.started_at)}: ${counts} (${percent(share)})`);
}

function speedBar(run, { x, wide, tall, bottom, top }) {
  const speed = run.tokens_per_second ?? 0,
    height = (tall * speed) / top;
  const told = `${minute(run.started_at)}: ${whole(speed)} tokens/s, ${run.device}, ${run.precision}`;
  return tipped(bar("fill", x, bottom - height, wide, height), told);
}

const VERDICTS = { good: "better", bad: "worse", even: "no difference shown" };

/** Differences with their intervals around zero. */
function forest(rows) {
  const height = 44 + 46 * rows.length;
  const words = rows.map((row) => `${row.space} less ${row.baseline}: ${number(row.value, 3)}`).join("; ");
  return chart(`Differences with 95 % intervals. ${words}`, height, (width) => {
    const reach = 1.1 * Math.max(...rows.flatMap((row) => [row.low, row.high, row.value].map(Math.abs)), 0.01);
    const ends = { left: 16, right: width - 16 };
    const x = (value) => ends.left + ((ends.right - ends.left) * (value + reach)) / (2 * reach);
    const signed = (value) => (value > 0 ? "+" : "") + number(value, 3);
    const numbers = ticks(-reach, reach, Math.min(6, width / 100)).map((value) =>
      label(signed(value), x(value), height - 4),
    );
    const zero = line("axis", x(0), 12, x(0), height - 22);
    return [zero, rows.map((row, i) => interval(row, 34 + 46 * i, x, ends)), numbers];
  });
}

function interval(row, y, x, { left, right }) {
  const kind = row.low > 0 ? "good" : row.high < 0 ? "bad" : "even",
    verdict = VERDICTS[kind];
  const name = `${row.measure}: ${row.space} against ${row.baseline}`;
  // Pixels per character, with room to spare: the verdict is in the same line.
  const room = Math.max(Math.floor((right - left) / 7.4) - verdict.length - 3, 8);
  const mark = svg(
    `g.${kind}`,
    line("interval", x(row.low), y, x(row.high), y),
    svg("circle", { cx: x(row.value), cy: y, r: 5 }),
  );
  return [
    label(name.length > room ? `${name.slice(0, room - 1)}…` : name, left, y - 12, "start", "name"),
    label(verdict, right, y - 12, "end", kind),
    line("grid", left, y, right, y),
    tipped(mark, `${name}: ${number(row.value, 3)} (${number(row.low, 3)} to ${number(row.high, 3)}), ${verdict}`),
  ];
}

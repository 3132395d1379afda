// The page: header, what needs attention, and the sections in their order.

const SECTIONS = [
  ["map", "Map", mapSection],
  ["distributions", "Distributions", null],
  ["partitions", "Partitions", partitions],
  ["rejections", "Rejected documents", rejections],
  ["duplicates", "Duplicates", duplicates],
  ["outliers", "Outliers", outliers],
  ["runs", "Runs", runs],
  ["generations", "Generations", generations],
  ["evaluation", "Search quality", evaluation],
  ["copies", "Derived copies", copies],
];

function isAbsent(section) {
  return "why" in section;
}

function header(report) {
  const { partitions, documents, chunks, vectors } = report.totals;
  const counts = { Partitions: partitions, Documents: documents, Chunks: chunks, Vectors: vectors };
  const known = Object.entries({ ...counts, Dimensions: report.dimension }).filter((entry) => entry[1] != null);
  const facts = {
    Lake: report.lake,
    Source: report.source,
    Model: report.model,
    "Embedding space": report.space,
    Made: `${minute(report.created_at)} UTC`,
  };
  return el(
    "header",
    el("p.eyebrow", "Embedding report"),
    said(report.title, "h1"),
    el(
      "div.tiles",
      known.map(([what, value]) => el("div", el("b", whole(value)), el("span", what))),
    ),
    el(
      "dl.facts",
      Object.entries(facts).map(([what, value]) => el("div", el("dt", what), el("dd", said(value)))),
    ),
  );
}

function attention(report) {
  const words = { error: "Failed", warning: "Check" };
  const notice = ({ level, text, section }) => {
    const place = section === "tokens" || section === "norms" ? "distributions" : section;
    const link = el("a", { href: `#${place}` }, "Details");
    return el("li", badge(level, words[level]), el("span", said(text), " ", link));
  };
  const calm = el("p.calm", "Nothing: all that was measured is as it should be.");
  const list = report.attention.length ? el("ul.notices", report.attention.map(notice)) : calm;
  return el("section.attention", { id: "attention" }, el("h2", "What needs attention"), list);
}

function section(report, id, heading, show) {
  const data = report[id],
    body = () => (isAbsent(data) ? absent(data.why) : show(data, report));
  const title = el("h2", { id: `${id}-heading` }, heading);
  return el("section", { id, "aria-labelledby": `${id}-heading` }, title, show ? body() : distributions(report));
}

/** The button that goes from the system's colors to light and dark ones. */
function themeButton() {
  const themes = ["auto", "light", "dark"],
    { dataset } = document.documentElement,
    node = document.getElementById("theme");
  const set = (theme) => {
    dataset.theme = theme;
    node.textContent = `Theme: ${theme}`;
  };
  node.addEventListener("click", () => set(themes[(themes.indexOf(dataset.theme) + 1) % themes.length]));
  set("auto");
}

function start() {
  const report = JSON.parse(document.getElementById("data").textContent);
  const sections = SECTIONS.map(([id, heading, show]) => section(report, id, heading, show));
  document.getElementById("nav").append(...SECTIONS.map(([id, heading]) => el("a", { href: `#${id}` }, heading)));
  document.getElementById("main").replaceChildren(header(report), attention(report), ...sections);
  themeButton();
}

start();

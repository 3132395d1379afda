// Tables that can be sorted, and begin with a few of their rows.

const ROWS = 25;

/** Columns of a field: as a text, and as a number. */
const textColumn = (name, field) => ({ name, by: (row) => row[field], cell: (row) => said(row[field]) });
const numberColumn = (name, field, show = whole) => ({
  name,
  kind: "number",
  by: (row) => row[field],
  cell: (row) => show(row[field]),
});

/** A column of shares from 0 to 1 as bars; `kind` says how a row's bar looks. */
const shareColumn = (name, share, kind = () => "usual") => ({
  name,
  by: share,
  cell: (row) => meter(share(row), percent(share(row)), kind(row)),
});

/**
 * A table. A column has a `name`, a `cell` that makes a row's content, perhaps `by`, the value that the table is sorted
 * by when its heading is pressed, and perhaps `kind`, a class. Shows `first` rows until asked for more.
 */
function table(columns, rows, caption, first = ROWS) {
  const body = el("tbody");
  let order = rows,
    count = first;
  const draw = () => {
    const cells = (row) => columns.map((c) => el("td", { class: c.kind ?? null }, c.cell(row)));
    body.replaceChildren(...order.slice(0, count).map((row) => el("tr", cells(row))));
    next.hidden = count >= order.length;
    next.textContent = `Show more of ${whole(order.length)}`;
  };
  const next = button("button.quiet", "", () => {
    count += 10 * ROWS;
    draw();
  });
  const heads = columns.map((column) => {
    const sort = () => {
      order = sorted(order, column.by, turn(heads, head));
      draw();
    };
    const text = column.by && rows.length > 3 ? button("button", column.name, sort) : column.name;
    const head = el("th", { scope: "col", class: column.kind ?? null }, text);
    return head;
  });
  const kind = columns.some((column) => column.kind === "text") ? "table.wordy" : "table";
  const made = el(kind, el("caption", caption), el("thead", el("tr", heads)), body);
  draw();
  const show = (others) => {
    [order, count] = [others, first];
    for (const head of heads) head.removeAttribute("aria-sort");
    draw();
  };
  const scroll = el("div.scroll", { tabindex: 0, role: "region", "aria-label": caption }, made);
  return { node: el("div.table", scroll, next), show };
}

/** Mark the heading that the table is sorted by; returns whether the smallest comes first. */
function turn(heads, head) {
  const isUp = head.getAttribute("aria-sort") !== "ascending";
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
  return isUp;
}

function sorted(rows, by, isUp) {
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : (a ?? -Infinity) - (b ?? -Infinity));
  return [...rows].sort((a, b) => (isUp ? 1 : -1) * compare(by(a), by(b)));
}

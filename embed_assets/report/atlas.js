// What is around the map: the legend, the search, and the same chunks as a table.

/** Where a chunk is. */
function place(point) {
  const swatch = point.group ? el("span", { class: `swatch ${point.group.kind}` }) : null;
  return el("p.place", swatch, said(point.partition_key), " / ", said(point.document_id));
}

/** A chunk: where it is, and its text. */
function passage(point, text = said(point.text, "p.snippet")) {
  const hasTitle = point.title && !point.document_id.endsWith(point.title);
  const headings = point.heading_path ? said(point.heading_path, "p.headings") : null;
  return [place(point), hasTitle ? said(point.title, "h4") : null, headings, text];
}

/** A button per group that shows and hides its dots; below the pointer it dims the other ones. */
function legend(map) {
  const entries = new Map(map.groups.map((group) => [group, legendEntry(map, group)]));
  const show = (groups, isShown) => {
    for (const group of groups) {
      map.hidden[isShown ? "delete" : "add"](group);
      entries.get(group).setAttribute("aria-pressed", String(isShown));
    }
    map.mark();
  };
  for (const [group, entry] of entries) entry.addEventListener("click", () => show([group], map.hidden.has(group)));
  const all = (text, isShown) => button("button.quiet", text, () => show(map.groups, isShown));
  const both = el("p.both", all("All", true), all("None", false));
  return el("div.legend", { role: "group", "aria-label": "Partitions on the map" }, [...entries.values()], both);
}

function legendEntry(map, group) {
  const focus = (isFocused) => () => {
    map.picture.classList.toggle("focused", isFocused);
    map.paths.get(group).classList.toggle("focus", isFocused);
  };
  const options = { type: "button", "aria-pressed": "true", title: group.name };
  return el(
    "button.entry",
    { ...options, on: { pointerenter: focus(true), pointerleave: focus(false) } },
    el("span", { class: `swatch ${group.kind}` }),
    said(group.name, "bdi.name"),
    el("span.count", whole(group.members.length)),
  );
}

/** The listed points as a table, which is made when it is opened. */
function pointTable(map) {
  const columns = [
    textColumn("Partition", "partition_key"),
    textColumn("Document", "document_id"),
    textColumn("Headings", "heading_path"),
    { name: "Text", kind: "text", cell: (point) => said(point.text) },
  ];
  let made = null;
  const details = el("details", el("summary", "The chunks of the map as a table"));
  details.addEventListener("toggle", () => {
    if (made) return;
    made = table(columns, map.listed, "The chunks on the map");
    details.append(made.node);
  });
  return { details, show: (points) => made?.show(points) };
}

/** The map with all that belongs to it. */
function atlas(data) {
  const map = new VectorMap(data.points.filter((point) => point.x !== null && point.y !== null));
  const list = pointTable(map),
    status = el("span.hint", { role: "status" });
  map.changed = () => {
    status.textContent = map.wanted ? `in ${plural(map.listed.length, "chunk")}` : "";
    list.show(map.listed);
  };
  const find = search("Find chunks with a word", (word) => {
    map.wanted = word;
    map.mark();
  });
  return [el("div.search", find, status), el("div.atlas", map.frame, legend(map)), list.details];
}

// The sections about the corpus.

const TWINS = 5; // Pairs that are shown at first.
const LONE = 9; // Outliers that are shown at first.

function mapSection(data) {
  if (!data.points.length) return absent("The sample has no chunks.");
  const count = whole(data.points.length);
  const part = data.points.length < data.chunks ? `${count} of ${whole(data.chunks)}` : `all ${count}`;
  const what = `Each dot is a chunk, colored by partition: ${part} chunks, placed by ${data.method}.`;
  return [intro(what, " Near dots have similar texts. Distances between far groups mean nothing."), atlas(data)];
}

function distributions(report) {
  return el(
    "div.pair",
    distribution("Chunk length", report.tokens, "tokens per chunk"),
    distribution("Vector norm", report.norms, "norm of a vector"),
  );
}

function distribution(heading, data, unit) {
  const body = () => {
    if (isAbsent(data)) return absent(data.why);
    if (!data.counts.some((count) => count > 0)) return absent("There are no chunks.");
    const [smallest, median, largest] = [data.smallest, data.median, data.largest].map((value) => number(value, 7));
    return [intro(`From ${smallest} to ${largest}, median ${median}.`), histogram(data, unit)];
  };
  return el("figure", el("figcaption", heading), body());
}

function partitions(rows, report) {
  if (!rows.length) return absent("There are no partitions: the source is empty.");
  const share = (p) => (p.chunks ? p.vectors / p.chunks : 1);
  const columns = [
    textColumn("Partition", "partition_key"),
    numberColumn("Documents", "documents"),
    numberColumn("Chunks", "chunks"),
    shareColumn("Chunks with a vector", share, (p) => (share(p) < 1 ? "low" : "usual")),
    numberColumn("Rejected", "rejected"),
  ];
  const made = table(columns, rows, "Partitions", 12);
  const find = search("Find a partition", (word) =>
    made.show(rows.filter((p) => p.partition_key.toLowerCase().includes(word))),
  );
  return [
    intro("What is rebuilt independently: first the partitions with chunks that have no vector, then the largest."),
    rows.length > 12 ? el("div.search", find) : null,
    made.node,
    more(report, "partitions", "partition"),
  ];
}

function rejections(data) {
  const count = data.reasons.reduce((sum, reason) => sum + reason.count, 0);
  if (!count) return absent("No document was rejected.");
  const allowed = data.limit_percent === null ? "" : `; up to ${number(data.limit_percent)} % may be`;
  const share = `${percent(count / data.documents)}${allowed}`;
  return [
    intro(`${whole(count)} of ${plural(data.documents, "document")} could not be read or embedded (${share}).`),
    el(
      "div.cards",
      data.reasons.map((reason) => rejection(reason, count)),
    ),
    more(data, "reasons", "reason"),
  ];
}

function rejection(reason, count) {
  const example = (one) =>
    el("li", said(one.partition_key), " / ", said(one.document_id), el("br"), said(one.detail, "span.hint"));
  return el(
    "article",
    el("h3", code(reason.reason), " ", el("span.count", plural(reason.count, "document"))),
    meter(reason.count / count, percent(reason.count / count)),
    el("p.advice", said(reason.advice)),
    el("ul.examples", reason.examples.map(example)),
  );
}

function duplicates(data) {
  const limit = data.limit_percent;
  const allowed = limit === null ? null : `Up to ${number(limit)} % of a partition's chunks may repeat another one.`;
  return [
    intro("Chunks that say the same take space, and places among search results."),
    allowed ? el("p.hint", allowed) : null,
    data.partitions.length ? duplicatesByPartition(data.partitions, limit) : absent("No chunk repeats another one."),
    more(data, "partitions", "partition"),
    el("h3", "Nearly equal texts"),
    el("p.hint", `Different texts with a cosine of at least ${number(data.cosine)}, some of each partition.`),
    data.pairs.length ? nearDuplicates(data.pairs) : absent("No two different texts have nearly the same vector."),
    more(data, "pairs", "pair"),
  ];
}

function duplicatesByPartition(rows, limit) {
  const share = (p) => p.repeated / (p.chunks || 1);
  const places = (one) => one.places.map((document, i) => [i ? ", " : "", said(document)]);
  const example = (one) =>
    el("li", el("b", `${whole(one.count)}×`), said(one.text, "span.clamp"), el("span.hint", places(one)));
  const columns = [
    textColumn("Partition", "partition_key"),
    numberColumn("Chunks", "chunks"),
    numberColumn("Equal to another one", "repeated"),
    shareColumn("Share", share, (p) => (limit !== null && 100 * share(p) > limit ? "low" : "usual")),
    numberColumn("Nearly equal", "near"),
    { name: "Equal texts", kind: "text", cell: (p) => el("ul.examples", p.examples.slice(0, 2).map(example)) },
  ];
  return table(columns, rows, "Repeated chunks by partition", 6).node;
}

const nearDuplicates = (pairs) => unfolded("div.twins", pairs.map(twins), TWINS, "more pair");

/** A box with the first nodes, and one to open with the others. */
function unfolded(box, nodes, first, noun) {
  const rest = nodes.slice(first),
    shown = el(box, nodes.slice(0, first));
  return rest.length ? [shown, el("details", el("summary", plural(rest.length, noun)), el(box, rest))] : shown;
}

/** Two similar chunks side by side, with the words marked that only one of them has. */
function twins(pair) {
  const [first, second] = difference(pair.first.text.split(/(?<=\s)/), pair.second.text.split(/(?<=\s)/));
  const isMarked = first.querySelector("mark") || second.querySelector("mark");
  const hint = isMarked ? "" : ": the words shown are equal, spaces or later words differ";
  return el(
    "article",
    el("p.score", "cosine ", el("b", score(pair.score, 4)), hint),
    el("div", passage(pair.first, first)),
    el("div", passage(pair.second, second)),
  );
}

/** Two lists of words as paragraphs, with those marked that are not in their longest common subsequence. */
function difference(first, second) {
  const isSame = (i, j) => first[i].trim() === second[j].trim();
  const longest = Array.from({ length: first.length + 1 }, () => new Uint16Array(second.length + 1));
  for (let i = first.length - 1; i >= 0; i--)
    for (let j = second.length - 1; j >= 0; j--)
      longest[i][j] = isSame(i, j) ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const [left, right] = [el("p.snippet", { dir: "auto" }), el("p.snippet", { dir: "auto" })];
  let i = 0,
    j = 0;
  while (i < first.length || j < second.length) {
    const isLeft = j === second.length || (i < first.length && longest[i + 1][j] >= longest[i][j + 1]);
    if (i < first.length && j < second.length && isSame(i, j)) {
      left.append(visible(first[i++]));
      right.append(visible(second[j++]));
    } else if (isLeft) left.append(el("mark", first[i++]));
    else right.append(el("mark", second[j++]));
  }
  return [left, right];
}

function outliers(data) {
  if (!data.chunks.length) return absent("The sample has no outliers.");
  const card = (chunk) => el("article", el("p.score", "mean cosine ", el("b", score(chunk.score))), passage(chunk));
  const near = whole(data.neighbors);
  const what = `Of ${plural(data.sampled, "chunk")}, those least like their ${near} nearest neighbours`;
  const why = "often boilerplate, garbled text or a lone subject";
  return [
    intro(`${what}: ${why}. The typical mean cosine is ${score(data.typical)}.`),
    unfolded("div.cards", data.chunks.map(card), LONE, "more chunk"),
    more(data, "chunks", "chunk"),
  ];
}

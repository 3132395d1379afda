// The sections about runs, spaces and search.

function runs(rows, report) {
  if (!rows.length) return absent("No run is recorded: run 'embed-assets sync'.");
  const columns = [
    { name: "Started (UTC)", by: (run) => run.started_at, cell: (run) => minute(run.started_at) },
    numberColumn("Embedded", "embedded"),
    numberColumn("Reused", "reused"),
    numberColumn("Tokens", "tokens"),
    numberColumn("Tokens per second", "tokens_per_second"),
    numberColumn("Duration", "seconds", duration),
    textColumn("Device", "device"),
    textColumn("Precision", "precision"),
  ];
  return [
    intro("What each run embedded and what it found embedded already, oldest to the left."),
    runCharts([...rows].reverse()),
    table(columns, rows, "Runs", 8).node,
    more(report, "runs", "run"),
  ];
}

const MARKS = { active: "good", ready: "good", building: "warning", previous: "even", retired: "even" };

function generations(rows, report) {
  if (!rows.length) return absent("No generation is recorded: run 'embed-assets sync'.");
  const look = (g) => (g.coverage === 1 ? "usual" : MARKS[g.state] === "even" ? "past" : "low");
  const columns = [
    { name: "State", cell: (g) => badge(MARKS[g.state], g.state) },
    { name: "Space", cell: (g) => [code(g.space), el("br"), said(g.model, "span.hint")] },
    numberColumn("Rows", "rows"),
    shareColumn("Chunks covered", (g) => g.coverage, look),
    numberColumn("Size", "size_bytes", bytes),
    { name: "Gates passed", cell: gatesPassed },
  ];
  return [
    intro("The spaces that the corpus is embedded in. Search reads the active one."),
    table(columns, rows, "Generations").node,
    more(report, "generations", "generation"),
    rows.filter((g) => g.gates.length).map(gates),
  ];
}

function gatesPassed(generation) {
  const { length } = generation.gates,
    passed = generation.gates.filter((gate) => gate.passed).length;
  return length ? badge(passed === length ? "good" : "error", `${passed} of ${length}`) : "none asked";
}

function gates(generation) {
  const rows = sorted(generation.gates, (gate) => Number(gate.passed), true);
  const columns = [
    {
      name: "Gate",
      cell: (g) => [badge(g.passed ? "good" : "error", g.passed ? "passed" : "failed"), " ", said(g.name)],
    },
    { ...numberColumn("Value", "value", number), by: null },
    { ...numberColumn("Limit", "limit", number), by: null },
    { name: "Found", kind: "text", cell: (g) => said(g.detail) },
  ];
  const isOpen = rows.some((gate) => !gate.passed) || generation.state === "building";
  const heading = el("summary", "Gates of ", code(generation.space));
  return el(
    "details",
    { open: isOpen },
    heading,
    table(columns, rows, "Gates").node,
    more(generation, "gates", "gate"),
  );
}

function evaluation(data) {
  if (!data.queries || !data.scores.length) return absent("The evaluation set has no queries.");
  const column = (name, field) => {
    const best = Math.max(...data.scores.map((row) => row[field]));
    const look = (value) => (value === best && data.scores.length > 1 ? "best" : "usual");
    return { name, by: (row) => row[field], cell: (row) => meter(row[field], score(row[field]), look(row[field])) };
  };
  const columns = [
    { name: "Space", by: (row) => row.space, cell: (row) => code(row.space) },
    column("nDCG@10", "ndcg_at_10"),
    column("Recall@10", "recall_at_10"),
    column("MRR", "mrr"),
  ];
  const queries = plural(data.queries, "query", "queries");
  return [
    intro(`How well exact search finds the chunks that ${queries} should find. Higher is better; 1 is the most.`),
    table(columns, data.scores, "Scores").node,
    more(data, "scores", "space"),
    data.differences.length ? differences(data) : null,
  ];
}

function differences(data) {
  return [
    el("h3", "Differences"),
    el("p.hint", "On the same queries, with 95 % intervals: one that includes zero shows no difference."),
    el("figure", forest(data.differences)),
    more(data, "differences", "difference"),
  ];
}

function copies(rows, report) {
  if (!rows.length) return absent("No derived copies: nothing but the Delta table holds vectors.");
  const size = (c) => (report.dimension ? c.bytes_per_vector / (4 * report.dimension) : null);
  const recall = (c) => (c.recall_at_10 === null ? "not measured" : meter(c.recall_at_10, percent(c.recall_at_10)));
  const columns = [
    { name: "Copy", by: (c) => c.kind, cell: (c) => [said(c.kind), el("br"), said(c.detail, "span.hint")] },
    numberColumn("Bytes per vector", "bytes_per_vector", number),
    shareColumn("Of float32", size),
    { name: "Recall@10", by: (c) => c.recall_at_10, cell: recall },
  ];
  return [
    intro("Other forms of the vectors, compared with exact search over the Delta table."),
    table(columns, rows, "Derived copies").node,
    more(report, "copies", "copy"),
  ];
}

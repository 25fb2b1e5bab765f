// What is known of one layer: beside the pointer, below the panels with its curve over time, and of all in a table.

/** What is told of a layer at a moment, as [name, words]. */
function factsOf(page, line, moment) {
  const { view } = page;
  const value = page.valueOf(line, moment);
  const kind = page.kindOf(line, moment);
  const facts = [
    [view.quantity, value === null ? kind : `${inWords(value, view.isShare)}${between(page, line, moment)}`],
  ];
  if (line.isModule)
    return [...facts, ["layers", `${line.layers.length}, of which this is the mean`], ...rangeOf(page, line, moment)];
  const row = line.members[0];
  const told = (key) => factOf(view, key, row, moment);
  const lag = view.metric === "lag" ? null : beside(view, "lag", row, moment);
  const found = [
    ["samples", told("samples") && grouped(told("samples"))],
    ["lag", lag === null ? null : `${(100 * lag).toFixed(1)} points`],
    ["remaining", remainingOf(told)],
    ["module", told("module")],
    ["shape", told("shape")],
    ["features", featuresOf(told)],
    ["reduction", told("reduction")],
    ["rows", told("rows")],
    ["fitted on", told("fitted_on")],
    ["converged", { true: "yes", false: "no" }[told("converged")]],
    ["L2", told("l2") === undefined || told("l2") === null ? null : short(told("l2"))],
  ];
  const words = { best: "the lowest error at the end", alike: "may be: not told from the lowest error at the end" };
  const rank = rankOf(view, line.layers);
  const isBest = rank ? [["best", words[rank]]] : [];
  const why = kind === "set aside" ? reasonsFor(line.layers[0]).map((note) => ["why", note]) : [];
  return [
    ...facts,
    ...isBest,
    ...why,
    ...found.filter(([, words]) => words !== null && words !== undefined && words !== ""),
  ];
}

/** The least and the greatest value of a module's layers. */
function rangeOf({ view }, line, moment) {
  const values = line.members.map((layer) => view.values[layer][moment]).filter((value) => value !== null);
  const ends = [Math.min(...values), Math.max(...values)].map((value) => inWords(value, view.isShare));
  return values.length ? [["range", ends.join(" to ")]] : [];
}

function between(page, line, moment) {
  const { view } = page;
  const ends = intervalOf(view, line, moment);
  if (!ends) return "";
  const [low, high] = ends.map((end) => inWords(end, view.isShare));
  return ` (95 %: ${low.replace(" %", "")} to ${high})`;
}

function featuresOf(told) {
  const [kept, total] = [told("features"), told("features_total")];
  if (kept === null || kept === undefined) return null;
  return total && total !== kept ? `${grouped(kept)} of ${grouped(total)}` : grouped(kept);
}

/** How much lower the error would be with all samples, in points. */
function remainingOf(told) {
  const [low, middle, high] = ["remaining_low", "remaining", "remaining_high"].map(told);
  if (middle === null || middle === undefined) return null;
  const points = (value) => (100 * value).toFixed(1);
  return `${points(middle)} points${low === null || low === undefined ? "" : ` (${points(low)} to ${points(high)})`}`;
}

function listOf(facts) {
  return make("dl", {}, ...facts.flatMap(([name, words]) => [make("dt", {}, name), make("dd", {}, String(words))]));
}

/** Show what is known of a line beside the pointer. */
function showHint(page, line, moment, { clientX, clientY }) {
  const hint = byId("hint");
  const name = make("strong", {}, line.name);
  hint.replaceChildren(name, make("em", {}, page.view.moments[moment].name), listOf(factsOf(page, line, moment)));
  hint.hidden = false;
  const { width, height } = hint.getBoundingClientRect();
  const left = clientX + 18 + width > window.innerWidth ? clientX - width - 18 : clientX + 18;
  const top = Math.min(clientY + 12, window.innerHeight - height - 8);
  place(hint, { left: Math.max(4, left), top: Math.max(4, top) });
}

/** Show the chosen layer, and its numbers over time. */
function paintDetails(page) {
  const chosen = page.chosenLine();
  const section = byId("details");
  section.hidden = chosen < 0;
  if (chosen < 0) return;
  const line = page.lines[chosen];
  const title = make("h2", {}, line.name);
  section.replaceChildren(make("div", {}, title, listOf(factsOf(page, line, page.moment))), timeCurve(page, line));
}

/** Draw one line's values over time, with their intervals. */
function timeCurve(page, line) {
  const { view, scale, moment } = page;
  const [width, height, left] = [420, 150, 46];
  const last = Math.max(1, view.moments.length - 1);
  const x = (i) => left + 6 + (i / last) * (width - left - 14);
  const y = (value) => 8 + (1 - Math.max(0, Math.min(1, scale.place(value)))) * (height - 30);
  const svg = makeSvg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "over-time",
    role: "img",
    "aria-label": `${line.name} over time`,
  });
  for (const [value, label] of scale.ticks(height - 30, 18)) {
    svg.append(makeSvg("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }));
    svg.append(makeSvg("text", { x: left - 5, y: y(value), class: "end" }, label));
  }
  const points = view.moments.map((_, i) => [i, page.valueOf(line, i)]);
  for (const [i, value] of points) if (value !== null) svg.append(...intervalAt(page, line, i, x, y));
  svg.append(makeSvg("path", { class: "curve", d: pathOver(points, x, y) }));
  for (const [i, value] of points) {
    const isNow = i === moment;
    if (value === null || (!isNow && points.length > 30)) continue;
    svg.append(makeSvg("circle", { class: isNow ? "dot now" : "dot", cx: x(i), cy: y(value), r: isNow ? 4.5 : 2.5 }));
  }
  svg.append(makeSvg("text", { x: x(0), y: height - 6 }, view.moments[0].name));
  if (last > 1) svg.append(makeSvg("text", { x: width - 4, y: height - 6, class: "end" }, view.moments[last].name));
  return svg;
}

function intervalAt(page, line, i, x, y) {
  const ends = intervalOf(page.view, line, i);
  return ends ? [makeSvg("line", { class: "interval", x1: x(i), x2: x(i), y1: y(ends[0]), y2: y(ends[1]) })] : [];
}

function pathOver(points, x, y) {
  let isOpen = false;
  return points
    .map(([i, value]) => {
      const part = value === null ? "" : `${isOpen ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
      isOpen = value !== null;
      return part;
    })
    .join("");
}

/** Show the numbers of the moment as a table. */
function paintTable(page) {
  const section = byId("table");
  if (section.hidden) return;
  const { view, moment, startMoment, lines } = page;
  const heads = ["layer", "features", view.quantity, "95 % interval", "at the start", "samples"];
  const rows = lines.map((line) => {
    const told = (key) => (line.isModule ? null : factOf(view, key, line.members[0], moment));
    const value = page.valueOf(line, moment);
    return [
      line.name,
      told("features"),
      value === null ? page.kindOf(line, moment) : inWords(value, view.isShare),
      intervalOf(view, line, moment)
        ?.map((end) => inWords(end, view.isShare))
        .join(" to "),
      startMoment < 0 ? "" : inWords(page.valueOf(line, startMoment), view.isShare),
      told("samples") && grouped(told("samples")),
    ];
  });
  const head = make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name)));
  const cellOf = (cell) => make("td", {}, String(cell ?? ""));
  const body = rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map(cellOf)));
  const caption = make("caption", {}, `${view.quantity}, ${view.stage}, ${view.moments[moment].name}`);
  section.replaceChildren(make("table", {}, caption, make("thead", {}, head), make("tbody", {}, ...body)));
}

// The three panels. They have a line for each layer at the same height: names and blocks, the map, the curve by depth.

const LEAST_NAMED = 11;

/** The height of a line in pixels: all fit into the window where they can, and none is thinner than two pixels. */
function heightOf(lines, room) {
  return Math.max(2, Math.min(34, Math.floor(room / Math.max(1, lines))));
}

/** Every n-th line has its name, as many as have room; a chosen line always has its own. */
function isNamed(i, height, chosen) {
  const every = height < LEAST_NAMED ? Math.ceil(16 / height) : 1;
  if (i === chosen) return true;
  const isNear = chosen >= 0 && Math.abs(i - chosen) * height < LEAST_NAMED + 1;
  return i % every === 0 && (every === 1 || !isNear);
}

// Left: names, modules and the error of the moment.

function drawLines(page) {
  const { lines, blocks, height, scale } = page;
  const levels = blocks.reduce((most, block) => Math.max(most, block.level + 1), 0);
  const body = byId("layers").querySelector(".body");
  body.style.height = `${lines.length * height}px`;
  byId("blocks").replaceChildren(...blocks.map((block) => blockButton(page, block)));
  byId("lines").replaceChildren(...lines.map((line, i) => lineElement(page, line, i, levels)));
  byId("lines").classList.toggle("thin", height < LEAST_NAMED + 2);
}

function blockButton(page, block) {
  const { height } = page;
  const count = block.to - block.from;
  const says = `${block.path}: ${count} layers, ${block.isClosed ? "show each" : "show as one"}`;
  const button = make("button", {
    type: "button",
    class: "block",
    title: says,
    "aria-label": says,
    "aria-expanded": !block.isClosed,
  });
  const tall = (block.bottom - block.top) * height;
  place(button, {
    left: block.level * page.blockWidth,
    top: block.top * height,
    height: Math.max(2, tall - 1),
    width: page.blockWidth - 2,
  });
  if (block.isClosed) button.textContent = tall > 12 ? "+" : "";
  else if (tall > 24) button.append(make("span", {}, cut(block.label, Math.floor(tall / 6.2))));
  button.addEventListener("click", () => page.toggle(block.key));
  return button;
}

function lineElement(page, line, i, levels) {
  const indent = line.isModule ? line.level : levels;
  const name = make("span", { class: "name" });
  const swatch = make("span", { class: "swatch" });
  const element = make("div", { class: "line", role: "option", id: `line-${i}` }, name, swatch);
  place(element, { top: i * page.height, height: page.height });
  name.style.left = `${indent * page.blockWidth + 4}px`;
  element.classList.toggle("module", Boolean(line.isModule));
  const rank = rankOf(page.view, line.layers);
  if (rank) element.classList.add(rank);
  return element;
}

function place(element, pixels) {
  for (const [side, value] of Object.entries(pixels)) element.style[side] = `${value}px`;
}

/** Give each line the colour and the number of the moment. */
function paintLines(page) {
  const { lines, height, scale, view, moment } = page;
  const room = byId("lines").clientWidth;
  const chosen = page.chosenLine();
  [...byId("lines").children].forEach((element, i) => {
    const [name, swatch] = element.children;
    const value = page.valueOf(lines[i], moment);
    const width = Math.floor(
      (room - parseFloat(name.style.left) - (page.isNarrow ? 48 : 70)) / (height < LEAST_NAMED + 2 ? 5.9 : 7),
    );
    name.textContent = isNamed(i, height, chosen)
      ? cut(height < LEAST_NAMED ? lines[i].tail : lines[i].label, width)
      : "";
    swatch.textContent = height >= LEAST_NAMED + 2 ? inWords(value, view.isShare) : "";
    paintSwatch(swatch, value, scale, page.kindOf(lines[i], moment));
    element.setAttribute("aria-selected", i === chosen);
    element.setAttribute(
      "aria-label",
      `${lines[i].name}: ${value === null ? page.kindOf(lines[i], moment) : inWords(value, view.isShare)}`,
    );
    element.classList.toggle("dim", page.isDim(lines[i]));
  });
  byId("lines").setAttribute("aria-activedescendant", chosen < 0 ? "" : `line-${chosen}`);
}

function paintSwatch(swatch, value, scale, kind) {
  swatch.classList.toggle("aside", kind === "set aside");
  swatch.style.backgroundColor = value === null ? "" : colourAt(scale.place(value));
  swatch.style.color = value === null ? "" : isLightAt(scale.place(value)) ? "#111" : "#fff";
}

// Middle: layers by moments.

function drawMap(page) {
  const { lines, height, view, scale } = page;
  const body = byId("map").querySelector(".body");
  const canvas = body.querySelector("canvas");
  const width = body.clientWidth;
  const tall = lines.length * height;
  const columns = (page.columns = columnsOf(width, view.moments.length));
  body.style.height = `${tall}px`;
  const context = sized(canvas, width, tall);
  const hatch = hatchOn(context);
  const gap = height > 8 ? 1 : 0;
  lines.forEach((line, i) => {
    view.moments.forEach((_, moment) => {
      const value = page.valueOf(line, moment);
      const cell = [
        columns[moment],
        i * height,
        columns[moment + 1] - columns[moment] - (columns[1] > 6 ? gap : 0),
        height - gap,
      ];
      if (value === null && page.kindOf(line, moment) !== "set aside") return;
      context.fillStyle = value === null ? hatch : colourAt(scale.place(value));
      context.globalAlpha = page.isDim(line) ? 0.25 : 1;
      context.fillRect(...cell);
      if (value !== null && cell[2] >= 38 && height >= 15) writeIn(context, cell, value, page);
    });
  });
  context.globalAlpha = 1;
  canvas.setAttribute(
    "aria-label",
    `${view.quantity} of ${lines.length} lines at ${view.moments.length} moments; the table has the numbers`,
  );
  drawTime(page, columns);
}

function writeIn(context, [left, top, width, height], value, { scale, view }) {
  context.fillStyle = isLightAt(scale.place(value)) ? "rgb(0 0 0 / .75)" : "rgb(255 255 255 / .85)";
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(view.isShare ? (100 * value).toFixed(1) : short(value), left + width / 2, top + height / 2 + 0.5);
}

/** The edges of the columns: whole pixels, at most 120 wide. */
function columnsOf(width, moments) {
  const all = Math.min(width, 120 * moments);
  return Array.from({ length: moments + 1 }, (_, i) => Math.round((i * all) / moments));
}

function sized(canvas, width, height) {
  const dense = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * dense));
  canvas.height = Math.max(1, Math.round(height * dense));
  place(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.scale(canvas.width / width || 1, canvas.height / height || 1);
  return context;
}

function hatchOn(context) {
  const tile = make("canvas", { width: 6, height: 6 });
  const pen = tile.getContext("2d");
  pen.strokeStyle = getComputedStyle(document.body).getPropertyValue("--hatch");
  pen.lineWidth = 1.2;
  pen.beginPath();
  for (const from of [-6, 0, 6]) {
    pen.moveTo(from, 6);
    pen.lineTo(from + 6, 0);
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

/** Name as many moments as have room, the last one always. */
function drawTime(page, columns) {
  const { view } = page;
  const names = view.moments.map(({ name }) => name.replace(/^(epoch|step) /, ""));
  const room = 14 + 6.5 * Math.max(...names.map((name) => Math.min(10, name.length)));
  const middle = (i) => (columns[i] + columns[i + 1]) / 2;
  const shown = [names.length - 1];
  const step = Math.max(1, Math.ceil(room / Math.max(0.01, columns[columns.length - 1] / names.length)));
  for (let i = 0; i < names.length - 1; i += step) if (middle(names.length - 1) - middle(i) >= room) shown.push(i);
  byId("time").replaceChildren(
    ...shown.map((i) => {
      const tick = make("span", { class: "tick" }, cut(names[i], 10));
      tick.style.left = `${middle(i)}px`;
      return tick;
    }),
    make("span", { id: "now-name" }),
  );
}

/** Move the mark of the moment. */
function paintNow(page) {
  const { columns, moment, view } = page;
  place(byId("now"), {
    left: columns[moment],
    width: Math.max(2, columns[moment + 1] - columns[moment] - (columns[1] > 6 ? 1 : 0)),
  });
  const name = byId("now-name");
  name.textContent = cut(view.moments[moment].name, 18);
  const half = 4 + 3.4 * name.textContent.length;
  const middle = (columns[moment] + columns[moment + 1]) / 2;
  name.style.left = `${Math.min(Math.max(middle, half), Math.max(half, byId("time").clientWidth - half))}px`;
}

// Right: the curve by depth, turned so that its layers stand beside their names.

function drawDepth(page) {
  const { lines, height, scale } = page;
  const body = byId("depth").querySelector(".body");
  const width = body.clientWidth;
  const tall = lines.length * height;
  body.style.height = `${tall}px`;
  page.names = page.isStacked ? (page.isNarrow ? 92 : 150) : 0;
  const inner = width - page.names - 12;
  page.x = (value) => page.names + 6 + Math.max(-0.02, Math.min(1.02, scale.place(value))) * inner;
  const ticks = scale.ticks(inner);
  drawValues(page, ticks, inner);
  const svg = makeSvg("svg", {
    width,
    height: tall,
    role: "img",
    "aria-label": "Curve by depth; the table has the numbers",
  });
  for (const [value] of ticks)
    svg.append(makeSvg("line", { class: "grid", x1: page.x(value), x2: page.x(value), y1: 0, y2: tall }));
  if (page.names) svg.append(...namesBeside(page));
  svg.append(...baselineIn(page, tall));
  const [start, band, curve] = ["start", "band", "curve"].map((name) => makeSvg("path", { class: name }));
  const dots = makeSvg("g", { class: "dots" });
  svg.append(band, start, curve, dots);
  body.replaceChildren(svg);
  page.curve = { start, band, curve, dots };
  start.setAttribute("d", page.startMoment < 0 ? "" : curveOf(page, page.startMoment));
  fillDots(page);
}

/** The axis, which is also the bar of the colours. */
function drawValues(page, ticks, inner) {
  const { scale } = page;
  const bar = make("canvas", { class: "colours", role: "img", "aria-label": "From light, few errors, to dark, many" });
  const pen = sized(bar, inner, 8);
  for (let i = 0; i < inner; i += 1) {
    pen.fillStyle = colourAt(i / inner);
    pen.fillRect(i, 0, 1.5, 8);
  }
  bar.style.left = `${page.names + 6}px`;
  byId("values").replaceChildren(
    bar,
    ...ticks.map(([value, label]) => {
      const tick = make("span", { class: "tick" }, label);
      tick.style.left = `${page.x(value)}px`;
      return tick;
    }),
  );
}

function namesBeside(page) {
  const chosen = page.chosenLine();
  return page.lines.flatMap((line, i) => {
    if (!isNamed(i, page.height, chosen)) return [];
    const name = cut(page.height < LEAST_NAMED ? line.tail : line.label, page.isNarrow ? 14 : 24);
    return [makeSvg("text", { class: "beside", x: 0, y: (i + 0.5) * page.height }, name)];
  });
}

function baselineIn(page, tall) {
  const { view, scale } = page;
  if (!view.baseline || scale.place(view.baseline.value) > 1 || scale.place(view.baseline.value) < 0) return [];
  const x = page.x(view.baseline.value);
  return [makeSvg("line", { class: "baseline", x1: x, x2: x, y1: 0, y2: tall })];
}

/** A path through the values of a moment; a layer without one breaks it. */
function curveOf(page, moment) {
  let path = "";
  let isOpen = false;
  page.lines.forEach((line, i) => {
    const value = page.valueOf(line, moment);
    if (value !== null)
      path += `${isOpen ? "L" : "M"}${page.x(value).toFixed(1)} ${((i + 0.5) * page.height).toFixed(1)}`;
    isOpen = value !== null;
  });
  return path;
}

/** The 95 % intervals of a moment as one band, in pieces where layers have none. */
function bandOf(page, moment) {
  const { view, lines, height } = page;
  if (!view.low) return "";
  const runs = [[]];
  lines.forEach((line, i) => {
    const ends = intervalOf(view, line, moment);
    if (ends) runs[runs.length - 1].push([i, ...ends.map(page.x)]);
    else runs.push([]);
  });
  return runs
    .filter((run) => run.length)
    .map((run) => piece(run, height))
    .join("");
}

function piece(run, height) {
  // A layer alone has a height of its own, where its neighbours would give it one.
  const [[first, ...ends]] = run;
  const corners =
    run.length === 1
      ? [
          [first - 0.3, ...ends],
          [first + 0.3, ...ends],
        ]
      : run;
  const left = corners.map(([i, low]) => `${low.toFixed(1)} ${((i + 0.5) * height).toFixed(1)}`);
  const right = corners.map(([i, , high]) => `${high.toFixed(1)} ${((i + 0.5) * height).toFixed(1)}`).reverse();
  return `M${[...left, ...right].join("L")}Z`;
}

function fillDots(page) {
  const { lines, height } = page;
  const radius = Math.max(1.6, Math.min(4.5, 0.2 * height));
  page.curve.dots.replaceChildren(
    ...lines.map((line) => {
      const rank = rankOf(page.view, line.layers);
      if (rank === "best") return makeSvg("path", { class: "star", d: starOf(Math.max(5, radius + 2)) });
      if (rank && !line.isModule && height >= 4) return makeSvg("circle", { r: radius, class: "dot alike" });
      return makeSvg("circle", { r: radius, class: height < 4 ? "none" : line.isModule ? "mean" : "dot" });
    }),
  );
}

function starOf(size) {
  const corner = (i) => [i % 2 ? 0.45 * size : size, (Math.PI * i) / 5];
  const points = Array.from({ length: 10 }, (_, i) => corner(i)).map(([r, turn]) => [
    r * Math.sin(turn),
    -r * Math.cos(turn),
  ]);
  return `M${points.map((point) => point.map((side) => side.toFixed(2)).join(" ")).join("L")}Z`;
}

/** Draw the curve of the moment. */
function paintDepth(page) {
  const { view, moment, lines, height, scale } = page;
  const { band, curve, dots } = page.curve;
  curve.setAttribute("d", curveOf(page, moment));
  band.setAttribute("d", bandOf(page, moment));
  lines.forEach((line, i) => {
    const value = page.valueOf(line, moment);
    const dot = dots.children[i];
    dot.classList.toggle("hidden", value === null);
    if (value === null) return;
    dot.setAttribute("transform", `translate(${page.x(value).toFixed(1)} ${((i + 0.5) * height).toFixed(1)})`);
    dot.style.fill = colourAt(scale.place(value));
  });
  const title = `${view.quantity} by depth, ${view.moments[moment].name}`;
  byId("depth-title").textContent = byId("depth-title").title = title[0].toUpperCase() + title.slice(1);
}

/** Say what is drawn beside the curve of the moment. */
function drawLegend(page) {
  const { view, scale } = page;
  const parts = [];
  if (view.low) parts.push(["key-band", "95 %"]);
  if (page.startMoment >= 0) parts.push(["key-start", "start"]);
  if (view.baseline) {
    const isOut = scale.place(view.baseline.value) > 1;
    parts.push([
      isOut ? "" : "key-baseline",
      `${view.baseline.name} ${inWords(view.baseline.value, true)}${isOut ? " \u2192" : ""}`,
    ]);
  }
  if (view.best.length) parts.push(["", "\u2605 best at the end"]);
  if (view.best.length > 1) parts.push(["key-alike", "may be"]);
  byId("legend").replaceChildren(
    ...parts.map(([key, words]) => make("span", {}, key ? make("i", { class: key }) : null, words)),
  );
}

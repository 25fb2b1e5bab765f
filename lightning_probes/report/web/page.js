// What is shown now, and what pointer, keys and buttons change of it.

const PLAYED_IN = 6000;
const LEAST_HEIGHT = 320;

const page = {
  view: views[0],
  chosenMoment: 0,
  pointedMoment: null,
  chosen: null,
  pointedLine: null,
  marked: null,
  isOnlyMarked: false,
  collapsed: new Set(),
  isLogarithmic: null,
  timer: null,

  /** The moment that is shown: the one that is pointed at, else the chosen one. */
  get moment() {
    return this.pointedMoment ?? this.chosenMoment;
  },
  valueOf(line, moment) {
    return line.isModule ? meanOf(this.view.values, line.members, moment) : this.view.values[line.members[0]][moment];
  },
  /** Why a line has no value at a moment; empty if it has one. */
  kindOf(line, moment) {
    if (this.valueOf(line, moment) !== null) return "";
    return line.members.every((layer) => isAbsent(this.view, layer, moment)) ? "not measured" : "set aside";
  },
  chosenLine() {
    return this.lines.findIndex((line) => line.layers.includes(this.chosen));
  },
  isDim(line) {
    return this.marked !== null && !line.layers.some((layer) => this.marked.has(layer));
  },
  toggle(key) {
    if (!this.collapsed.delete(key)) this.collapsed.add(key);
    layOut();
  },
};

// Drawing: `layOut` where lines or sizes change, `paint` where only the moment or the chosen layer does.

function layOut() {
  const shown =
    page.isOnlyMarked && page.marked?.size
      ? page.view.layers.filter((layer) => page.marked.has(layer))
      : page.view.layers;
  Object.assign(page, linesOf(page.view, shown, page.collapsed));
  page.isNarrow = isAtMost(720);
  // The curve by depth stands below the others then, and has names of its own.
  page.isStacked = isAtMost(980);
  page.blockWidth = page.isNarrow ? 14 : 19;
  page.scale = scaleOf(page.view, page.isLogarithmic);
  page.startMoment = page.view.moments.findIndex(({ epoch, step }) => !epoch && !step);
  const top = page.isNarrow ? 0 : byId("panels").getBoundingClientRect().top + window.scrollY + 70;
  page.height = heightOf(page.lines.length, Math.max(LEAST_HEIGHT, window.innerHeight - Math.min(top, 340) - 20));
  document.body.style.setProperty("--height", `${page.height}px`);
  drawLines(page);
  drawMap(page);
  drawDepth(page);
  drawLegend(page);
  drawControls();
  paint();
}

function isAtMost(width) {
  return window.matchMedia(`(max-width: ${width}px)`).matches;
}

function paint() {
  paintLines(page);
  paintNow(page);
  paintDepth(page);
  paintRows();
  paintDetails(page);
  paintTable(page);
  byId("slider").value = page.moment;
  byId("moment").textContent = whenOf(page.view.moments[page.moment]);
  byId("slider").setAttribute("aria-valuetext", byId("moment").textContent);
  rememberSoon();
}

/** Say when a moment was, by epoch and step, and of which network it is. */
function whenOf({ name, epoch, step, network }) {
  const also = !step || name === "start" ? "" : name.startsWith("step") ? `epoch ${epoch}` : `step ${grouped(step)}`;
  return [name, also, network && network !== name ? network : ""].filter(Boolean).join(" \u00b7 ");
}

let isDue = false;
function paintSoon() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    paint();
  });
}

/** Mark the line that is pointed at and the chosen one, across all panels. */
function paintRows() {
  for (const body of document.querySelectorAll(".panel > .body")) {
    for (const [name, i] of [
      ["pointed", page.pointedLine ?? -1],
      ["chosen", page.chosenLine()],
    ]) {
      const mark =
        body.querySelector(`:scope > .row.${name}`) ?? body.appendChild(make("div", { class: `row ${name}` }));
      mark.hidden = i < 0;
      place(mark, { top: i * page.height, height: page.height });
    }
  }
}

function drawControls() {
  const { view } = page;
  const [layers, moments] = [view.layers.length, view.moments.length];
  const count = (number, what) => `${grouped(number)} ${what}${number === 1 ? "" : "s"}`;
  byId("about").textContent = [
    `${view.quantity} of linear probes, ${view.stage}${view.target && `, ${view.target}`}`,
    count(layers, "layer"),
    count(moments, "moment"),
  ].join(" \u00b7 ");
  byId("map-about").textContent =
    view.moments.length > 1 ? `${count(moments, "moment")}, after ${view.unit}; point at one` : "one moment";
  // The slider must not move under the pointer while the words beside it change.
  byId("moment").style.minWidth = `${Math.min(34, Math.max(...view.moments.map((moment) => whenOf(moment).length)))}ch`;
  byId("slider").max = moments - 1;
  byId("slider").disabled = byId("play").disabled = moments < 2;
  byId("fold").hidden = page.division.length < 2;
  byId("fold").setAttribute(
    "aria-pressed",
    page.division.length > 0 && page.division.every((key) => page.collapsed.has(key)),
  );
  byId("logarithmic").setAttribute("aria-pressed", page.scale.isLog);
  byId("logarithmic").disabled = view.values.flat().some((value) => value < 0);
  byId("warning").textContent = view.method.warning;
  byId("warning").hidden = !view.method.warning;
  byId("method").textContent = view.method.sentences.join(" ");
  byId("marked").hidden = page.marked === null;
  byId("marked-count").textContent = page.marked
    ? `${view.layers.filter((layer) => page.marked.has(layer)).length} of ${layers}`
    : "";
  byId("only").setAttribute("aria-pressed", page.isOnlyMarked);
}

// Choosing.

function setMoment(moment) {
  page.chosenMoment = Math.max(0, Math.min(page.view.moments.length - 1, moment));
  page.pointedMoment = null;
  paintSoon();
}

function setView(view) {
  const before = page.view.moments[page.chosenMoment];
  page.view = view;
  const same = view.moments.findIndex(({ epoch, step }) => epoch === before?.epoch && step === before?.step);
  page.chosenMoment = same < 0 ? view.moments.length - 1 : same;
  page.pointedMoment = page.pointedLine = null;
  layOut();
}

function chooseLine(i) {
  const line = page.lines[Math.max(0, Math.min(page.lines.length - 1, i))];
  if (!line) return;
  [page.chosen] = line.layers;
  if (page.isStacked) drawDepth(page);
  paintSoon();
}

/** Mark some layers, or none with null; others are dimmed, or left out if only the marked ones are asked for. */
function mark(layers, isOnly = false) {
  page.marked = layers;
  page.isOnlyMarked = isOnly && layers !== null;
  layOut();
}

function search(words) {
  const asked = words.trim().toLowerCase();
  if (!asked) return mark(null);
  return mark(
    new Set(page.view.layers.filter((layer) => data.layers[layer].toLowerCase().includes(asked))),
    page.isOnlyMarked,
  );
}

function unmark() {
  byId("search").value = "";
  document
    .querySelectorAll("#findings [aria-pressed=true]")
    .forEach((link) => link.setAttribute("aria-pressed", false));
  mark(null);
}

function play() {
  if (page.timer !== null) return stop();
  if (page.moment === page.view.moments.length - 1) setMoment(0);
  const each = Math.max(60, Math.min(700, PLAYED_IN / page.view.moments.length));
  page.timer = setInterval(() => {
    if (page.moment < page.view.moments.length - 1) setMoment(page.moment + 1);
    else stop();
  }, each);
  return sayPlaying();
}

function stop() {
  clearInterval(page.timer);
  page.timer = null;
  sayPlaying();
}

function sayPlaying() {
  byId("play").classList.toggle("playing", page.timer !== null);
  byId("play").setAttribute("aria-label", page.timer === null ? "Play" : "Pause");
}

// Pointer.

function listenToPointer() {
  for (const body of document.querySelectorAll(".panel > .body")) {
    body.addEventListener("pointermove", (event) => point(body, event));
    body.addEventListener("pointerleave", leave);
    body.addEventListener("click", (event) => {
      if (event.target.closest("button")) return;
      if (page.pointedMoment !== null) setMoment(page.pointedMoment);
      chooseLine(lineUnder(body, event));
    });
  }
}

function lineUnder(body, event) {
  const top = event.clientY - body.getBoundingClientRect().top;
  return Math.max(0, Math.min(page.lines.length - 1, Math.floor(top / page.height)));
}

function point(body, event) {
  page.pointedLine = lineUnder(body, event);
  if (body.parentElement.id === "map") {
    const left = event.clientX - body.getBoundingClientRect().left;
    const column = page.columns.findIndex((edge) => edge > left) - 1;
    // Beyond the last column nothing is pointed at.
    page.pointedMoment = column < 0 ? null : column;
    if (page.timer !== null) stop();
  }
  paintSoon();
  if (event.pointerType !== "touch") showHint(page, page.lines[page.pointedLine], page.moment, event);
}

function leave() {
  page.pointedLine = page.pointedMoment = null;
  byId("hint").hidden = true;
  paintSoon();
}

// Keys.

const KEYS = {
  ArrowLeft: () => setMoment(page.moment - 1),
  ArrowRight: () => setMoment(page.moment + 1),
  ArrowUp: () => chooseLine(page.chosenLine() - 1),
  ArrowDown: () => chooseLine(page.chosenLine() + 1),
  Home: () => setMoment(0),
  End: () => setMoment(page.view.moments.length - 1),
  " ": play,
  "/": () => byId("search").focus(),
  Escape: unmark,
};

function onKey(event) {
  const act = KEYS[event.key];
  const isTyping = event.target.matches("select, input[type=search]");
  const isPressing = event.key === " " && event.target.matches("button, summary");
  if (!act || event.ctrlKey || event.metaKey || event.altKey || isPressing || (isTyping && event.key !== "Escape"))
    return;
  event.preventDefault();
  if (isTyping) event.target.blur();
  act();
}

// What the address says after #, so that a link shows what its writer saw.

function recall() {
  const said = new URLSearchParams(window.location.hash.slice(1));
  if (said.has("theme")) setTheme(said.get("theme"));
  if (said.has("view")) page.view = views[Number(said.get("view"))] ?? page.view;
  const last = page.view.moments.length - 1;
  page.chosenMoment = said.has("moment") ? Math.max(0, Math.min(last, Number(said.get("moment")) || 0)) : last;
  const named = data.layers.indexOf(said.get("layer"));
  page.chosen = named < 0 ? (page.view.best[0] ?? page.view.layers[page.view.layers.length - 1]) : named;
  if (said.has("search")) {
    byId("search").value = said.get("search");
    search(said.get("search"));
  }
}

let writing = null;
function rememberSoon() {
  // Browsers complain of an address that changes many times a second, as it would while playing.
  clearTimeout(writing);
  writing = setTimeout(remember, 500);
}

function remember() {
  const said = new URLSearchParams({ moment: page.chosenMoment, layer: data.layers[page.chosen] ?? "" });
  if (page.view !== views[0]) said.set("view", views.indexOf(page.view));
  if (byId("search").value) said.set("search", byId("search").value);
  if (document.documentElement.dataset.theme) said.set("theme", document.documentElement.dataset.theme);
  try {
    window.history.replaceState(null, "", `#${said}`);
  } catch {
    // A page inside another one has no address of its own.
  }
}

// Setting up.

function setTheme(theme) {
  document.documentElement.dataset.theme = theme === "dark" ? "dark" : "light";
}

function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}

/** A list to choose from for each of stage, loader, target and metric of which there are several. */
function offerChoices() {
  const keys = ["stage", "target", "loader", "metric"];
  const several = keys.filter((key) => new Set(views.map((view) => view[key])).size > 1);
  byId("choices").replaceChildren(
    ...several.map((key) => {
      const list = make(
        "select",
        { "data-key": key },
        ...[...new Set(views.map((view) => view[key]))].map((value) => make("option", { value }, wordFor(key, value))),
      );
      list.addEventListener("change", () => setView(nearest(key, list.value)));
      return make("label", {}, `${key} `, list);
    }),
  );
}

function wordFor(key, value) {
  return key === "metric" ? String(value).replaceAll("_", " ") : String(value);
}

/** Of the views with a value the one that differs least from the one that is shown. */
function nearest(key, value) {
  const alike = (view) =>
    ["stage", "target", "loader", "metric"].filter((other) => view[other] === page.view[other]).length;
  const fitting = views.filter((view) => String(view[key]) === value);
  return fitting.reduce((found, view) => (alike(view) > alike(found) ? view : found));
}

function sayChoices() {
  for (const list of byId("choices").querySelectorAll("select")) list.value = page.view[list.dataset.key];
}

function listFindings() {
  byId("findings").hidden = !data.findings.length;
  byId("findings")
    .querySelector("ol")
    .replaceChildren(
      ...data.findings.map((finding) => {
        const link = make(
          "button",
          { type: "button", class: "finding", "aria-pressed": false, disabled: finding.layers.length ? null : "" },
          finding.sentence,
        );
        link.addEventListener("click", () => {
          if (page.view !== views[finding.view]) {
            setView(views[finding.view]);
            sayChoices();
          }
          unmark();
          link.setAttribute("aria-pressed", true);
          mark(new Set(finding.layers));
          byId("panels").scrollIntoView({ block: "nearest" });
        });
        return make("li", { "data-kind": finding.kind }, link);
      }),
    );
}

function listNotes() {
  if (data.notes.length)
    byId("notes").replaceChildren(
      make("h2", {}, "Notes"),
      make("ul", {}, ...data.notes.map((note) => make("li", {}, note))),
    );
}

function listenToControls() {
  byId("play").addEventListener("click", play);
  byId("slider").addEventListener("input", () => setMoment(Number(byId("slider").value)));
  byId("search").addEventListener("input", () => search(byId("search").value));
  byId("only").addEventListener("click", () => mark(page.marked, !page.isOnlyMarked));
  byId("unmark").addEventListener("click", unmark);
  byId("fold").addEventListener("click", () => {
    const isFolded = page.division.every((key) => page.collapsed.has(key));
    page.collapsed = new Set(isFolded ? [] : page.division);
    layOut();
  });
  byId("logarithmic").addEventListener("click", () => {
    page.isLogarithmic = !page.scale.isLog;
    layOut();
  });
  byId("as-table").addEventListener("click", () => {
    byId("table").hidden = !byId("table").hidden;
    byId("as-table").setAttribute("aria-pressed", !byId("table").hidden);
    paint();
    if (!byId("table").hidden) byId("table").scrollIntoView({ block: "nearest" });
  });
  byId("theme").addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    layOut();
  });
  byId("choices").addEventListener("change", sayChoices);
  document.addEventListener("keydown", onKey);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", layOut);
}

/** Lay out again where the width of the page changes, as with a window or a scroll bar. */
function listenToWidth() {
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    layOut();
  }).observe(document.body);
}

function begin() {
  listNotes();
  listFindings();
  if (!views.length) {
    document.body.classList.add("empty");
    byId("about").textContent = "This report has no rows yet: nothing has been published.";
    return;
  }
  offerChoices();
  recall();
  layOut();
  sayChoices();
  listenToPointer();
  listenToControls();
  listenToWidth();
}

begin();

// What the report says, as the page reads it: values by layer and moment, and what is known of each.

const data = JSON.parse(document.getElementById("data").textContent);

/** Add to a view what is asked of it often: where a layer stands in it, and which cells have no row. */
function opened(view) {
  view.at = new Map(view.layers.map((layer, i) => [layer, i]));
  view.missing = new Set(view.absent.map(([layer, moment]) => `${layer},${moment}`));
  return view;
}

const views = data.views.map(opened);
const best = new Set(data.best);

/** The layers to mark: findings and best layers are about the first view, and say nothing of other numbers. */
function bestIn(view) {
  return view === views[0] ? best : new Set();
}

/** What a cell without a value stands for: a layer that was set aside, or a moment at which it was not measured. */
function isAbsent(view, layer, moment) {
  return view.missing.has(`${layer},${moment}`);
}

function factOf(view, key, layer, moment) {
  const told = data.facts[view.facts][key]?.[layer];
  return Array.isArray(told) ? told[moment] : told;
}

/** Notes that name a layer; of a layer without any, those that speak of setting layers aside. */
function reasonsFor(layer) {
  const named = (data.reasons[layer] ?? []).map((i) => data.notes[i]);
  return named.length ? named : data.notes.filter((note) => note.includes("set aside"));
}

/** The value of another metric of the same stage, loader and target, at the same moment; null if it has none. */
function beside(view, metric, layer, moment) {
  const other = views.find((one) => one.metric === metric && isOfSame(one, view));
  const { epoch, step } = view.moments[moment];
  const column = other?.moments.findIndex((one) => one.epoch === epoch && one.step === step) ?? -1;
  const row = other?.at.get(view.layers[layer]);
  return column < 0 || row === undefined ? null : other.values[row][column];
}

function isOfSame(one, other) {
  return one.stage === other.stage && one.loader === other.loader && one.target === other.target;
}

/** The mean of some layers' values at a moment, as a collapsed module shows it; null without any. */
function meanOf(values, layers, moment) {
  let sum = 0;
  let number = 0;
  for (const layer of layers) {
    const value = values[layer][moment];
    if (value !== null) {
      sum += value;
      number += 1;
    }
  }
  return number ? sum / number : null;
}

/** The 95 % interval of a line's value at a moment; null if it has none, as the mean of a module, or a NaN. */
function intervalOf(view, line, moment) {
  if (line.isModule || !view.low || view.values[line.members[0]][moment] === null) return null;
  const ends = [view.low, view.high].map((matrix) => matrix[line.members[0]][moment]);
  return ends.includes(null) ? null : ends;
}

function inWords(value, isShare) {
  if (value === null || value === undefined) return "\u2013";
  return isShare ? `${(100 * value).toFixed(1)} %` : short(value);
}

function short(value) {
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

function grouped(number) {
  return number.toLocaleString("en-US");
}

/** Make an element; what is text goes through textContent, so that no name of a layer can become a tag. */
function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function makeSvg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

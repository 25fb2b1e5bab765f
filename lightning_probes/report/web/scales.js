// From a value to a place on an axis and a colour. One scale serves both, so the axis is also the colour bar.

// The stops of viridis (van der Walt and Smith), from many errors to none: even in lightness, and told apart with any
// kind of colour vision. What a layer knows is light.
const STOPS = [
  [68, 1, 84],
  [72, 36, 117],
  [65, 68, 135],
  [53, 95, 141],
  [42, 120, 142],
  [33, 145, 140],
  [34, 168, 132],
  [68, 191, 112],
  [122, 209, 81],
  [189, 223, 38],
  [253, 231, 37],
];

// Between errors of 0 and 1 % a logarithmic axis is linear, so that an error of 0 has a place.
const LINEAR_ERROR = 0.01;
const LOGARITHMIC_FROM = 8;

/** The colour at a place on a scale, from 0 (the least value, light) to 1. */
function colourAt(place) {
  return `rgb(${mixed(place).map(Math.round).join(" ")})`;
}

/** Whether dark text is read better on the colour at a place. */
function isLightAt(place) {
  const [red, green, blue] = mixed(place).map((channel) => (channel / 255) ** 2.2);
  // Where black and white have the same contrast, by the definition of the WCAG: (L + .05)^2 = 1.05 * .05.
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179;
}

function mixed(place) {
  const at = (1 - Math.min(1, Math.max(0, place))) * (STOPS.length - 1);
  const below = Math.min(STOPS.length - 2, Math.floor(at));
  return STOPS[below].map((channel, i) => channel + (at - below) * (STOPS[below + 1][i] - channel));
}

function quantile(sorted, share) {
  return sorted[Math.round(share * (sorted.length - 1))];
}

/** Whether values ask for a logarithmic axis: none is negative, and they differ by a factor of more than eight. */
function asksForLogarithm(sorted, isShare) {
  if (!sorted.length || sorted[0] < 0) return false;
  const least = isShare ? Math.max(quantile(sorted, 0.02), LINEAR_ERROR) : quantile(sorted, 0.02);
  return least > 0 && sorted[sorted.length - 1] > LOGARITHMIC_FROM * least;
}

/**
 * Make the scale of a view: `place(value)` from 0 to 1, `ticks(room)` as [value, label].
 *
 * The baseline has a place only if it is near: a majority class of 90 % must not squeeze errors of 3 to 8.
 */
function scaleOf(view, isLogarithmic) {
  const sorted = view.values
    .flat()
    .filter((value) => value !== null)
    .sort((a, b) => a - b);
  const isLog = isLogarithmic ?? asksForLogarithm(sorted, view.isShare);
  const linear = view.isShare ? LINEAR_ERROR : Math.max(1e-12, sorted.find((value) => value > 0) ?? 1);
  const forward = isLog ? (value) => Math.asinh(value / (2 * linear)) : (value) => value;
  const ends = [sorted[0] ?? 0, sorted[sorted.length - 1] ?? 1, ...lastBounds(view)];
  let [low, high] = [forward(Math.min(...ends)), forward(Math.max(...ends))];
  if (!isLog && low >= 0 && low < 0.4 * high) low = 0;
  const near = view.baseline ? forward(view.baseline.value) : high;
  if (near > high && near < high + 0.2 * (high - low)) high = near;
  const margin = 0.03 * (high - low) || 0.05 * Math.abs(high) || 0.01;
  [low, high] = [low === 0 && !isLog ? 0 : Math.max(low - margin, sorted[0] >= 0 ? 0 : -Infinity), high + margin];
  const place = (value) => (forward(value) - low) / (high - low);
  const ticks = (room, gap = 36) => spaced(isLog ? decades() : evenly(low, high), place, room, gap, view.isShare);
  return { place, ticks, isLog, low, high };
}

/** The ends of the last moment's intervals, which are looked at most. */
function lastBounds(view) {
  return [view.low, view.high]
    .flatMap((matrix) => (matrix ?? []).map((bounds) => bounds[bounds.length - 1]))
    .filter((bound) => bound !== null);
}

function decades() {
  const values = [0];
  for (let power = -8; power < 9; power += 1) values.push(...[1, 2, 5].map((digit) => digit * 10 ** power));
  return values;
}

function evenly(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((one) => one >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

/** Keep the ticks that are at least a gap of pixels from one another, the roundest first. */
function spaced(values, place, room, gap, isShare) {
  const kept = [];
  const inside = values.filter((value) => place(value) >= 0 && place(value) <= 1);
  const roundest = [...inside].sort((a, b) => leadingDigit(a) - leadingDigit(b));
  for (const value of roundest) {
    if (kept.every((other) => Math.abs(place(other) - place(value)) * room >= gap)) kept.push(value);
  }
  return kept.sort((a, b) => a - b).map((value) => [value, isShare ? `${short(100 * value)} %` : short(value)]);
}

function leadingDigit(value) {
  return value ? Math.round(Math.abs(value) / 10 ** Math.floor(Math.log10(Math.abs(value)) + 1e-9)) : 0;
}

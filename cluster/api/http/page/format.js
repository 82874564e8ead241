// Figures as people read them, and the colours of Macs.

const GIB = 2 ** 30;

/** About 3 significant digits, without exponents. */
export function figure(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 100) return Math.round(value).toLocaleString("en");
  if (size >= 10) return value.toFixed(1);
  return value.toFixed(size >= 0.1 ? 2 : size ? 3 : 0);
}

export const whole = (value) => Math.round(value).toLocaleString("en");
/** A share in percent; null and undefined, which are unknown, as a dash. */
export const percent = (share) => (share == null ? "–" : `${Math.round(100 * share)} %`);
export const milliseconds = (value) => (value >= 1000 ? `${figure(value / 1000)} s` : `${figure(value)} ms`);

export function bytes(count) {
  if (count >= GIB / 10) return `${figure(count / GIB)} GiB`;
  return count >= 2 ** 20 ? `${figure(count / 2 ** 20)} MiB` : `${whole(count / 2 ** 10)} KiB`;
}

/** A rate of a network, in its usual unit. */
export function bandwidth(bytesPerSecond) {
  const bits = 8 * bytesPerSecond;
  return bits >= 1e9 ? `${figure(bits / 1e9)} Gb/s` : `${figure(bits / 1e6)} Mb/s`;
}

/** "12 s", "4 min", "3 h 5 min", "2 d 4 h". */
export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  const minutes = Math.floor(s / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return hours % 24 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${Math.floor(hours / 24)} d`;
}

/** "1 layer", "3 layers". */
export const count = (number, word) => `${whole(number)} ${word}${number === 1 ? "" : "s"}`;

/** Layers [start, end) as people write them. */
export const layers = ([start, end]) => (end - start === 1 ? `${start}` : `${start}–${end - 1}`);

/** What a Mac holds: its layers, and its number among the Macs that share them. */
export const holding = (stage) =>
  stage.ranks > 1 ? `${layers(stage.layers)} (rank ${stage.rank} of ${stage.ranks})` : layers(stage.layers);

/** The stages of a pipeline, each as the list of the Macs that share its layers; most have one. */
export const groups = (stages) =>
  stages.filter((stage) => !stage.rank).map((first) => stages.filter((stage) => stage.index === first.index));

/** Which Macs hold which layers: "ada 0–3, bob+cyd 4–7", where bob and cyd share theirs. */
export const holders = (stages) =>
  groups(stages)
    .map((ranks) => `${ranks.map((stage) => stage.worker).join("+")} ${layers(ranks[0].layers)}`)
    .join(", ");

const COLOURS = 8;
const numbers = new Map();

/** Give each of these Macs a colour that no other has, while there are enough. A Mac keeps its colour when it is lost. */
export function nameMacs(names) {
  for (const name of names) if (!numbers.has(name)) numbers.set(name, numbers.size);
}

/** Return whether a text begins with the name of a Mac. */
export const beginsWithMac = (text) =>
  [...numbers.keys()].some((name) => text.startsWith(name) && !/[\w-]/.test(text[name.length] ?? ""));

/** The colour of a Mac, the same wherever it is shown. */
export function colour(name) {
  nameMacs([name]);
  return `var(--mac-${numbers.get(name) % COLOURS})`;
}

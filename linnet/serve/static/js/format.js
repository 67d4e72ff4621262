// Numbers as people read them.

const WHOLE = new Intl.NumberFormat("en");

/** 12345 as "12,345". */
export function count(number) {
  return WHOLE.format(Math.round(number));
}

/** 12345 as "12K", 1000000 as "1M": for lengths of context, where 1024 is a thousand as well. */
export function brief(number) {
  const base = number >= 1024 && number % 1024 === 0 ? 1024 : 1000;
  if (number >= base * base) return `${round(number / (base * base))}M`;
  return number >= base ? `${round(number / base)}K` : String(Math.round(number));
}

function round(number) {
  return number < 10 ? Math.round(number * 10) / 10 : Math.round(number);
}

/** 0.2134 as "0.21 s", 75 as "1 min 15 s". */
export function duration(seconds) {
  if (seconds < 10 && !Number.isInteger(seconds)) return `${seconds.toFixed(2)} s`;
  if (seconds < 60) return `${seconds.toFixed(0)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** 63.27 as "63.3 tok/s". */
export function speed(tokensPerSecond) {
  return `${tokensPerSecond < 100 ? tokensPerSecond.toFixed(1) : count(tokensPerSecond)} tok/s`;
}

/** "1 token", "2 tokens". */
export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

/** Joins phrases so that a line breaks after a dot, not within a phrase. */
export function listed(phrases) {
  return phrases.map((phrase) => phrase.replaceAll(" ", "\u00a0")).join("\u00a0· ");
}

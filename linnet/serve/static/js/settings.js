// What the reader set, kept in this browser; the API key only as long as the tab is open.

import { parseTools } from "./tools.js";

/**
 * @typedef {object} Settings
 * @property {string} model an id of /v1/models; "" for the server's first
 * @property {string} system the system prompt
 * @property {string} tools JSON text; "" for none
 * @property {number | null} thinking tokens a model may think; null: as many as it likes
 * @property {Record<"temperature" | "top_p" | "top_k" | "min_p" | "max_tokens" | "seed", string>}
 *   sampling as typed; "" leaves the choice to the server
 */

const PLACE = "linnet.settings";
const KEY_PLACE = "linnet.api-key";
export const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

/** A small model may never end by itself; empty, the context is the limit. */
export const DEFAULT_SAMPLING = {
  ...Object.fromEntries(SAMPLING.map((name) => [name, ""])),
  max_tokens: "2048",
};

const DEFAULTS = {
  model: "",
  system: "",
  tools: "",
  thinking: null,
  sampling: DEFAULT_SAMPLING,
};

/** @returns {Settings} */
export function loadSettings() {
  try {
    const saved = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    return { ...DEFAULTS, ...saved, sampling: { ...DEFAULTS.sampling, ...saved.sampling } };
  } catch {
    return structuredClone(DEFAULTS);
  }
}

/** @param {Settings} settings */
export function saveSettings(settings) {
  localStorage.setItem(PLACE, JSON.stringify(settings));
}

export function loadApiKey() {
  return sessionStorage.getItem(KEY_PLACE) ?? "";
}

export function saveApiKey(key) {
  sessionStorage.setItem(KEY_PLACE, key);
}

/**
 * The body of a chat completion request.
 *
 * @param {Settings} settings
 * @param {string} model "" leaves it to the server
 * @param {object[]} messages
 * @throws {ToolsError} if the tools are not what they should be
 */
export function requestBody(settings, model, messages) {
  const body = {
    model: model || undefined,
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    return_progress: true,
    repetition_stop: {},
  };
  for (const name of SAMPLING) {
    if (settings.sampling[name] !== "") body[name] = Number(settings.sampling[name]);
  }
  if (settings.thinking !== null) body.thinking_token_budget = settings.thinking;
  const tools = parseTools(settings.tools);
  if (tools.length) body.tools = tools;
  return body;
}

// How many tokens a chat takes before its next message.

import { shownTurns, toMessages } from "./chat_tree.js";
import { parseTools, ToolsError } from "./tools.js";

/**
 * @param {import("./chat_tree.js").Chat} chat
 * @returns {number | null} tokens up to the last answer, whole or growing; null if it did not tell
 */
export function toldTokens(chat) {
  const { stats } = shownTurns(chat).at(-1) ?? {};
  return stats && stats.promptTokens !== null ? stats.promptTokens + stats.completionTokens : null;
}

/**
 * @param {import("./chat_tree.js").Chat} chat
 * @param {import("./settings.js").Settings} settings
 * @param {(what: object) => Promise<number>} countTokens
 * @returns {Promise<number>} 0 if nobody can count
 */
export async function contextTokens(chat, settings, countTokens) {
  const told = toldTokens(chat);
  if (told !== null) return told;
  const messages = toMessages(shownTurns(chat), settings.system.trim());
  if (!messages.length) messages.push({ role: "user", content: "" }); // the frame of any message
  try {
    const tools = parseTools(settings.tools);
    return await countTokens(tools.length ? { messages, tools } : { messages });
  } catch (error) {
    if (error instanceof ToolsError || error.status !== undefined) return 0;
    throw error;
  }
}

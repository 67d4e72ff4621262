// A chat as a tree of turns: an edited message or a second answer is a new branch beside the old.

/**
 * @typedef {{ name: string, text: string, tokens: number | null }} Attachment
 * @typedef {{ id: string, name: string, arguments: string }} ToolCall
 *
 * @typedef {object} Turn
 * @property {string} id
 * @property {string | null} parent
 * @property {string[]} children
 * @property {string | null} chosen the child that is shown
 * @property {"root" | "user" | "assistant" | "tool"} role
 * @property {string} text
 * @property {Attachment[]} [attachments] of a user
 * @property {string} [callId] the call that a tool's turn answers
 * @property {string} [name] of the tool that answered
 * @property {string} [reasoning] of an assistant; for the rest of its fields see answer.js
 * @property {ToolCall[]} [calls]
 *
 * @typedef {object} Chat
 * @property {string} id
 * @property {string} title
 * @property {number} updated milliseconds since 1970
 * @property {string} system the system prompt of the last request
 * @property {Record<string, Turn>} turns
 */

const ROOT = "root";
const TITLE_LEN = 60;

/** @returns {Chat} */
export function newChat() {
  const root = { id: ROOT, parent: null, children: [], chosen: null, role: "root", text: "" };
  return { id: newId(), title: "", updated: Date.now(), system: "", turns: { [ROOT]: root } };
}

/** Adds a turn below `parent` (null: at the start) and shows it. */
export function addTurn(chat, parent, fields) {
  const turn = { id: newId(), parent: parent ?? ROOT, children: [], chosen: null, ...fields };
  chat.turns[turn.id] = turn;
  chat.turns[turn.parent].children.push(turn.id);
  chat.turns[turn.parent].chosen = turn.id;
  chat.updated = Date.now();
  if (turn.role === "user" && !chat.title) chat.title = titleOf(turn);
  return turn;
}

/** Removes a turn that has no children, such as an answer that never began. */
export function removeTurn(chat, id) {
  const { parent } = chat.turns[id];
  const owner = chat.turns[parent];
  owner.children = owner.children.filter((child) => child !== id);
  owner.chosen = owner.children.at(-1) ?? null;
  delete chat.turns[id];
}

/** @returns {Turn[]} the turns shown, from the first to the last */
export function shownTurns(chat) {
  const turns = [];
  let id = chat.turns[ROOT].chosen;
  while (id) {
    turns.push(chat.turns[id]);
    id = chat.turns[id].chosen;
  }
  return turns;
}

/** @returns {string[]} the ids of a turn and its alternatives, oldest first */
export function alternatives(chat, id) {
  return chat.turns[chat.turns[id].parent].children;
}

/** Shows an alternative of a turn. */
export function choose(chat, id) {
  chat.turns[chat.turns[id].parent].chosen = id;
}

/** The turns from the start down to `id`, which need not be shown. */
export function turnsDownTo(chat, id) {
  const turns = [];
  for (let turn = chat.turns[id]; turn && turn.role !== "root"; turn = chat.turns[turn.parent]) {
    turns.unshift(turn);
  }
  return turns;
}

/**
 * @param {Turn[]} turns
 * @param {string} system
 * @returns {object[]} messages of a chat completion request
 */
export function toMessages(turns, system) {
  const messages = turns.filter(isSaid).map(toMessage);
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** False for an answer that failed before its first token. */
function isSaid(turn) {
  return turn.role !== "assistant" || turn.text || turn.reasoning || turn.calls.length;
}

function toMessage(turn) {
  if (turn.role === "user") return { role: "user", content: userContent(turn) };
  if (turn.role === "tool") {
    return { role: "tool", tool_call_id: turn.callId, name: turn.name, content: turn.text };
  }
  const message = { role: "assistant", content: turn.text };
  if (turn.reasoning) message.reasoning_content = turn.reasoning;
  if (turn.calls?.length) {
    message.tool_calls = turn.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: asObject(call.arguments) },
    }));
  }
  return message;
}

/** Arguments that were cut off are no JSON, and the server would refuse the whole chat for them. */
function asObject(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" && !Array.isArray(value) ? text : "{}";
  } catch {
    return "{}";
  }
}

function userContent({ attachments = [], text }) {
  return [...attachments.map((attachment) => attachment.text), text].filter(Boolean).join("\n\n");
}

function titleOf({ text, attachments = [] }) {
  const line = text.trim().split("\n")[0] || attachments[0]?.name || "Untitled";
  return line.length > TITLE_LEN ? `${line.slice(0, TITLE_LEN - 1)}…` : line;
}

function newId() {
  // crypto.randomUUID is missing where the page came over plain HTTP from another machine.
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

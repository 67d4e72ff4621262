// The chats: the one that is shown, those that are being answered, and what can be done to them.

import { applyChunk, newAnswer } from "./answer.js";
import { ApiError } from "./api.js";
import {
  addTurn, choose, newChat, removeTurn, shownTurns, toMessages, turnsDownTo,
} from "./chat_tree.js";
import { requestBody } from "./settings.js";

const SAVE_EVERY_MS = 5_000; // while an answer grows

/**
 * @typedef {object} ChatEvents
 * @property {() => void} onShown another chat is shown, or the shown one has other turns
 * @property {(turnId: string) => void} onGrown an answer of the shown chat has gained something
 * @property {() => void} onListed the list of chats, or which are being answered, has changed
 * @property {(turn: object) => void} onAnswered an answer has ended
 * @property {(message: string) => void} onProblem
 */
export class Chats {
  #api;
  #store;
  #settings;
  #model;
  #events;
  /** @type {Map<string, { chat: object, stop: AbortController }>} by the id of the chat */
  #running = new Map();
  #removed = new Set();

  /**
   * @param {object} parts
   * @param {ReturnType<import("./api.js").createApi>} parts.api
   * @param {object} parts.store as `openChatStore` gives it
   * @param {import("./settings.js").Settings} parts.settings
   * @param {() => string} parts.model gives the id of the model that is to answer
   * @param {ChatEvents} parts.events
   */
  constructor({ api, store, settings, model, events }) {
    this.#api = api;
    this.#store = store;
    this.#settings = settings;
    this.#model = model;
    this.#events = events;
    this.shown = newChat();
  }

  /** Whether the shown chat is being answered; meanwhile, nothing of it may be changed. */
  get isRunning() {
    return this.#running.has(this.shown.id);
  }

  get runningIds() {
    return new Set(this.#running.keys());
  }

  /** Shows an empty chat, which is kept once something is sent. */
  begin() {
    this.#show(newChat());
  }

  /** Shows a kept chat; returns whether there is one with this id. */
  async open(id) {
    if (id === this.shown.id) return true;
    const chat = this.#running.get(id)?.chat ?? (await this.#store.load(id));
    if (!chat) return false;
    if (!this.#running.has(id)) markInterrupted(chat);
    this.#show(chat);
    return true;
  }

  /** Deletes a chat; returns how to bring it back. */
  async remove(id) {
    this.#removed.add(id);
    this.#running.get(id)?.stop.abort();
    const chat = id === this.shown.id ? this.shown : await this.#store.load(id);
    await this.#store.remove(id);
    if (id === this.shown.id) this.begin();
    this.#events.onListed();
    return async () => {
      this.#removed.delete(id);
      await this.#save(chat);
    };
  }

  async removeAll() {
    for (const { chat, stop } of this.#running.values()) {
      this.#removed.add(chat.id);
      stop.abort();
    }
    await this.#store.clear();
    this.begin();
    this.#events.onListed();
  }

  /** @throws {import("./tools.js").ToolsError} here and below, if the tools are wrong */
  send(text, attachments) {
    const last = shownTurns(this.shown).at(-1);
    return this.#ask(last?.id ?? null, [{ role: "user", text, attachments }]);
  }

  /** Sends a message of the reader again, with another text, beside the first. */
  resend(turnId, text) {
    const { parent, attachments } = this.shown.turns[turnId];
    return this.#ask(parent, [{ role: "user", text, attachments }]);
  }

  /** Gives what the tools returned to the answer that called them. */
  sendResults(turnId, results) {
    const { calls } = this.shown.turns[turnId];
    const turns = calls.map(({ id, name }, index) => {
      return { role: "tool", callId: id, name, text: results[index] };
    });
    return this.#ask(turnId, turns);
  }

  /** Asks for another answer beside one; one that failed at its start is forgotten. */
  regenerate(turnId) {
    const chat = this.shown;
    const turn = chat.turns[turnId];
    const body = this.#body(turn.parent);
    if (turn.state === "failed" && !turn.stats.completionTokens) removeTurn(chat, turnId);
    return this.#answer(turn.parent, body);
  }

  /** Stops the answer of the shown chat. */
  stop() {
    this.#running.get(this.shown.id)?.stop.abort();
  }

  /** Shows an alternative of a turn. */
  choose(turnId) {
    choose(this.shown, turnId);
    this.#events.onShown();
    this.#save(this.shown);
  }

  #show(chat) {
    this.shown = chat;
    this.#events.onShown();
  }

  #ask(parentId, turns) {
    requestBody(this.#settings, "", []); // what is wrong should fail before anything is added
    let last = parentId;
    for (const turn of turns) last = addTurn(this.shown, last, turn).id;
    return this.#answer(last, this.#body(last));
  }

  #body(turnId) {
    this.shown.system = this.#settings.system.trim();
    const messages = toMessages(turnsDownTo(this.shown, turnId), this.shown.system);
    return requestBody(this.#settings, this.#model(), messages);
  }

  async #answer(parentId, body) {
    const chat = this.shown;
    const turn = addTurn(chat, parentId, newAnswer(body.model ?? ""));
    const stop = new AbortController();
    this.#running.set(chat.id, { chat, stop });
    this.#events.onShown();
    this.#save(chat);
    await this.#receive(chat, turn, body, stop.signal);
    this.#running.delete(chat.id);
    if (chat === this.shown) this.#events.onShown();
    await this.#save(chat);
    this.#events.onAnswered(turn);
  }

  /** Fills a turn with what the server sends; whatever happens is told in the turn. */
  async #receive(chat, turn, body, signal) {
    const start = performance.now();
    let savedAt = start;
    try {
      for await (const chunk of this.#api.chat(body, signal)) {
        const now = performance.now();
        applyChunk(turn, chunk, now - start);
        if (chat === this.shown) this.#events.onGrown(turn.id);
        if (now - savedAt > SAVE_EVERY_MS) {
          savedAt = now;
          this.#save(chat);
        }
      }
      turn.state = "done";
    } catch (error) {
      turn.state = error.name === "AbortError" ? "stopped" : "failed";
      if (turn.state === "stopped") return;
      if (!(error instanceof ApiError)) throw error;
      const { message, status, retryAfter } = error;
      turn.error = { message, status, retryAfter };
    }
  }

  async #save(chat) {
    if (this.#removed.has(chat.id)) return;
    try {
      await this.#store.save(chat);
    } catch (error) {
      this.#events.onProblem(`This browser cannot keep the chat: ${error.message}`);
    }
    this.#events.onListed();
  }
}

/** An answer that was being written when the page closed will not go on. */
function markInterrupted(chat) {
  for (const turn of Object.values(chat.turns)) {
    if (turn.state !== "writing") continue;
    turn.state = "failed";
    const message = "The page was closed while this was written.";
    turn.error = { message, status: 0, retryAfter: 0 };
  }
}

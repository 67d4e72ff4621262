// The shown turns of a chat, from top to bottom.

import { AnswerView } from "./answer_view.js";
import { alternatives, shownTurns } from "./chat_tree.js";
import { UserView } from "./user_view.js";

/**
 * @typedef {object} ThreadActions
 * @property {(turnId: string) => void} regenerate
 * @property {(turnId: string, text: string) => boolean} resend
 * @property {(turnId: string, results: string[]) => void} sendResults
 * @property {(turnId: string) => void} choose an alternative
 * @property {() => void} onDrawn
 */
export class ThreadView {
  #element;
  #actions;
  #chat = null;
  /** @type {Map<string, AnswerView | UserView>} */
  #views = new Map();

  /**
   * @param {HTMLElement} element
   * @param {ThreadActions} actions
   */
  constructor(element, actions) {
    this.#element = element;
    this.#actions = actions;
  }

  /** Shows the chat as it is now. */
  show(chat) {
    if (chat !== this.#chat) this.#clear();
    this.#chat = chat;
    const turns = shownTurns(chat);
    const messages = turns.filter((turn) => turn.role !== "tool");
    const wanted = new Set(messages.map((turn) => turn.id));
    for (const [id, view] of this.#views) {
      if (wanted.has(id)) continue;
      view.remove();
      this.#views.delete(id);
    }
    for (const turn of messages) this.#showTurn(turn, turns);
  }

  /** Shows what an answer has gained. */
  grow(turnId) {
    this.#views.get(turnId)?.grow();
  }

  /** Opens the last message of the reader for editing; returns whether there is one. */
  editLast() {
    const last = [...this.#views.values()].findLast((view) => view instanceof UserView);
    last?.edit();
    return Boolean(last);
  }

  #showTurn(turn, turns) {
    let view = this.#views.get(turn.id);
    if (!view) {
      view = turn.role === "user" ? this.#userView(turn) : this.#answerView(turn);
      this.#views.set(turn.id, view);
      this.#element.append(view.element);
    }
    const branch = this.#branch(turn.id);
    if (turn.role === "user") return view.update(branch);
    const results = resultsAfter(turn, turns);
    const [first] = results;
    const resultBranch = first ? this.#branch(first.id) : { place: 0, length: 0 };
    view.update(branch, results.map((result) => result.text), resultBranch);
  }

  #userView(turn) {
    return new UserView(turn, {
      resend: (text) => this.#actions.resend(turn.id, text),
      step: (step) => this.#step(turn.id, step),
    });
  }

  #answerView(turn) {
    return new AnswerView(turn, {
      regenerate: () => this.#actions.regenerate(turn.id),
      sendResults: (results) => this.#actions.sendResults(turn.id, results),
      step: (step) => this.#step(turn.id, step),
      stepResults: (step) => this.#step(turn.chosen, step),
      onDrawn: this.#actions.onDrawn,
    });
  }

  #branch(turnId) {
    const ids = alternatives(this.#chat, turnId);
    return { place: ids.indexOf(turnId), length: ids.length };
  }

  #step(turnId, step) {
    const { place } = this.#branch(turnId);
    this.#actions.choose(alternatives(this.#chat, turnId)[place + step]);
  }

  #clear() {
    for (const view of this.#views.values()) view.remove();
    this.#views.clear();
  }
}

/** The tools' turns that follow an answer. */
function resultsAfter(answer, turns) {
  const rest = turns.slice(turns.indexOf(answer) + 1);
  const end = rest.findIndex((turn) => turn.role !== "tool");
  return end < 0 ? rest : rest.slice(0, end);
}

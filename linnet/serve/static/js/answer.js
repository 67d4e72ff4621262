// An assistant's turn while it grows: what each chunk of a stream adds to it.

/**
 * @typedef {object} Stats
 * @property {number | null} promptTokens
 * @property {number | null} cachedTokens
 * @property {number} completionTokens counted by the server, or by chunks until it says
 * @property {number} reasoningTokens
 * @property {number | null} firstTokenMs from the request to the first token, as seen here
 * @property {number | null} lastTokenMs
 * @property {number | null} tokensPerSecond while writing
 *
 * @typedef {object} Answer fields of an assistant's turn
 * @property {string} text
 * @property {string} reasoning
 * @property {import("./chat_tree.js").ToolCall[]} calls
 * @property {"writing" | "done" | "stopped" | "failed"} state
 * @property {string | null} finish the server's finish_reason, or "repetition"
 * @property {{ message: string, status: number, retryAfter: number } | null} error
 * @property {{ total: number, cache: number, processed: number, time_ms: number } | null} progress
 * @property {number} thinkingMs
 * @property {string} model
 * @property {Stats} stats
 */

/** @returns {{ role: "assistant" } & Answer} */
export function newAnswer(model) {
  return {
    role: "assistant",
    text: "",
    reasoning: "",
    calls: [],
    state: "writing",
    finish: null,
    error: null,
    progress: null,
    thinkingMs: 0,
    model,
    stats: {
      promptTokens: null,
      cachedTokens: null,
      completionTokens: 0,
      reasoningTokens: 0,
      firstTokenMs: null,
      lastTokenMs: null,
      tokensPerSecond: null,
    },
  };
}

/**
 * Adds a chunk of a streamed chat completion to an answer.
 *
 * @param {Answer} answer
 * @param {object} chunk
 * @param {number} elapsedMs since the request was sent
 */
export function applyChunk(answer, chunk, elapsedMs) {
  if (chunk.model) answer.model = chunk.model;
  if (chunk.prompt_progress) answer.progress = chunk.prompt_progress;
  const choice = chunk.choices?.[0];
  const { stats } = answer;
  const tokensBefore = stats.completionTokens;
  const isReasoning = choice ? applyDelta(answer, choice.delta ?? {}, elapsedMs) : false;
  if (choice?.finish_reason) {
    answer.finish = choice.stop_reason === "repetition" ? "repetition" : choice.finish_reason;
  }
  if (chunk.usage) applyUsage(stats, chunk.usage);
  const numReasoning = chunk.usage?.completion_tokens_details?.reasoning_tokens;
  if (numReasoning) stats.reasoningTokens = numReasoning;
  // Until it ends, the server may not tell what was reasoning.
  else if (isReasoning) stats.reasoningTokens += stats.completionTokens - tokensBefore;
  if (chunk.timings) stats.tokensPerSecond = chunk.timings.predicted_per_second;
  else if (choice) stats.tokensPerSecond = measuredSpeed(stats);
}

function measuredSpeed({ completionTokens, firstTokenMs, lastTokenMs }) {
  return lastTokenMs > firstTokenMs
    ? ((completionTokens - 1) * 1000) / (lastTokenMs - firstTokenMs)
    : null;
}

/** Returns whether the delta holds reasoning. */
function applyDelta(answer, delta, elapsedMs) {
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  const { stats } = answer;
  if (reasoning || delta.content || delta.tool_calls) {
    stats.firstTokenMs ??= elapsedMs;
    stats.lastTokenMs = elapsedMs;
    stats.completionTokens += 1;
  }
  if (reasoning) {
    answer.reasoning += reasoning;
    answer.thinkingMs = elapsedMs - stats.firstTokenMs;
  }
  answer.text += delta.content ?? "";
  for (const call of delta.tool_calls ?? []) applyCall(answer.calls, call);
  return reasoning !== "";
}

function applyCall(calls, { index, id, function: { name, arguments: text } = {} }) {
  calls[index] ??= { id: "", name: "", arguments: "" };
  if (id) calls[index].id = id;
  if (name) calls[index].name = name;
  calls[index].arguments += text ?? "";
}

function applyUsage(stats, usage) {
  stats.promptTokens = usage.prompt_tokens;
  stats.completionTokens = usage.completion_tokens;
  stats.cachedTokens = usage.prompt_tokens_details?.cached_tokens ?? stats.cachedTokens;
}

/** True while the answer is inside its think span. */
export function isThinking(answer) {
  const hasOutput = answer.text.trim() || answer.calls.length;
  return answer.state === "writing" && answer.reasoning !== "" && !hasOutput;
}

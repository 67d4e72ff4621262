// The requests that this page makes to its server.

import { serverSentEvents } from "./sse.js";

/** A request that failed, with a message for the reader. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{ status?: number, retryAfter?: number }} [facts] the HTTP status, 0 if no answer came;
   *   seconds after which another attempt makes sense
   */
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/**
 * @param {() => string} apiKey gives the key at the time of a request, "" for none
 */
export function createApi(apiKey) {
  async function request(path, { body, signal } = {}) {
    const headers = {};
    if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      body: body && JSON.stringify(body),
      headers,
      signal,
    }).catch((error) => {
      throw named(error, "The server cannot be reached.");
    });
    if (!response.ok) throw await failure(response);
    return response;
  }

  return {
    /** @returns {Promise<{ id: string, max_model_len?: number }[]>} */
    async models() {
      return (await (await request("v1/models")).json()).data;
    },

    /** Returns if the server is well, raises otherwise. */
    async health() {
      await request("health");
    },

    /** @returns {Promise<number>} how many tokens `prompt` or a chat's `messages` make */
    async countTokens(what, signal) {
      return (await (await request("tokenize", { body: what, signal })).json()).count;
    },

    /** Yields the chunks of a streamed chat completion. */
    async *chat(body, signal) {
      const response = await request("v1/chat/completions", { body, signal });
      try {
        for await (const data of serverSentEvents(response.body)) {
          if (data === "[DONE]") return;
          const chunk = JSON.parse(data);
          if (chunk.error) throw new ApiError(chunk.error.message, { status: response.status });
          yield chunk;
        }
      } catch (error) {
        throw named(error, "The connection was lost before the answer was complete.");
      }
      throw new ApiError("The connection closed before the answer was complete.");
    },
  };
}

/** Gives an error of the network a name that a reader understands. */
function named(error, message) {
  const isOurs = error instanceof ApiError || error.name === "AbortError";
  return isOurs ? error : new ApiError(message);
}

async function failure(response) {
  const answer = await response.json().catch(() => ({}));
  const message = answer.error?.message ?? `The server answered ${response.status}.`;
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  return new ApiError(message, { status: response.status, retryAfter });
}

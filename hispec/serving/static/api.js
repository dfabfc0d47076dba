// The server's OpenAI-compatible API: the model list, and a chat completion as a stream.

const address = (path) => new URL(path, document.baseURI);

/** An answer of the server that is no success, or none at all (status 0). */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status HTTP status
   * @param {?string} param the field of the request that is wrong, if the server names one
   */
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** What `error` of a response body says. */
function told(body, status, words) {
  const error = body?.error ?? {};
  const detail = error.message ?? (typeof body?.detail === "string" ? body.detail : null);
  return new ApiError(detail ?? `The server answers ${status} ${words}`.trim(), status, error.param);
}

async function request(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw told(body, response.status, response.statusText);
  }
  return response;
}

/** The first entry of `/v1/models`. */
export async function model(key) {
  const response = await request("v1/models", key);
  const entry = (await response.json()).data?.[0];
  if (!entry) throw new ApiError("The server lists no model.", response.status);
  return entry;
}

/**
 * The values of the `data` fields of an event stream.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const lines = text.split(/\r\n|\n|\r(?!$)/);
      text = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // a connection that broke has nothing to cancel
  }
}

/**
 * Ask for a chat completion; yields the chunks of its stream.
 * @param {Object} body fields of the request
 * @param {?string} key API key
 * @param {AbortSignal} signal ends the request
 * @throws {ApiError} a refusal, an error in the stream, or a stream that ends too early
 */
export async function* chat(body, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let whole = false;
  try {
    for await (const data of events(response.body)) {
      whole ||= data === "[DONE]";
      if (whole) continue; // to the end: a body left unread would be a broken connection
      const chunk = JSON.parse(data);
      if (chunk.error) throw told(chunk, response.status, "");
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection to the server broke off.");
  }
  if (!whole) throw new ApiError("The server ended the answer early.");
}

// Chats kept in this browser, in IndexedDB: two stores, so that a list needs no whole chats.

/** @typedef {{ id: string, title: string, updated: number }} Title */

const CHATS = "chats";
const TITLES = "titles";

/** Opens the store; without IndexedDB (some browsers' private windows) chats last until reload. */
export async function openChatStore() {
  try {
    return storeOn(await openDatabase());
  } catch {
    return storeInMemory();
  }
}

function openDatabase() {
  const request = indexedDB.open("linnet", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore(CHATS, { keyPath: "id" });
    request.result.createObjectStore(TITLES, { keyPath: "id" });
  };
  return result(request);
}

function storeOn(database) {
  const reading = (name) => database.transaction(name).objectStore(name);
  const writing = () => {
    const transaction = database.transaction([CHATS, TITLES], "readwrite");
    return [transaction, transaction.objectStore(CHATS), transaction.objectStore(TITLES)];
  };
  return {
    /** @returns {Promise<Title[]>} newest first */
    async list() {
      return newestFirst(await result(reading(TITLES).getAll()));
    },
    /** @returns {Promise<import("./chat_tree.js").Chat | undefined>} */
    load(id) {
      return result(reading(CHATS).get(id));
    },
    save(chat) {
      const [transaction, chats, titles] = writing();
      chats.put(chat);
      titles.put(titleOf(chat));
      return completed(transaction);
    },
    remove(id) {
      const [transaction, chats, titles] = writing();
      chats.delete(id);
      titles.delete(id);
      return completed(transaction);
    },
    clear() {
      const [transaction, chats, titles] = writing();
      chats.clear();
      titles.clear();
      return completed(transaction);
    },
  };
}

function storeInMemory() {
  const chats = new Map();
  return {
    list: async () => newestFirst([...chats.values()].map(titleOf)),
    load: async (id) => structuredClone(chats.get(id)),
    save: async (chat) => void chats.set(chat.id, structuredClone(chat)),
    remove: async (id) => void chats.delete(id),
    clear: async () => chats.clear(),
  };
}

function titleOf({ id, title, updated }) {
  return { id, title, updated };
}

function newestFirst(titles) {
  return titles.sort((one, other) => other.updated - one.updated);
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function completed(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });
}

// Loads the official SDK, unchanged: from this server if scripts/run has installed it, otherwise from a public CDN.

const HERE = "sdk/centrifuge.js";
const ELSEWHERE = "https://cdn.jsdelivr.net/npm/centrifuge@5.8.0/dist/centrifuge.js";
const DIGEST = "sha384-Hc/rqOA60dxGHNnO+nCm7KQ1yc4I121B7eeuuZ9vJMHEq6vVV4onLLtrwG8L79xQ";

/** Resolves to the class `Centrifuge`. */
export async function loadCentrifuge() {
  try {
    await script({ src: HERE });
  } catch {
    await script({ src: ELSEWHERE, integrity: DIGEST, crossOrigin: "anonymous" });
  }
  return globalThis.Centrifuge;
}

function script(attributes) {
  return new Promise((resolve, reject) => {
    const element = Object.assign(document.createElement("script"), attributes);
    element.addEventListener("load", resolve);
    element.addEventListener("error", () => reject(new Error(`can't load ${attributes.src}`)));
    document.head.append(element);
  });
}

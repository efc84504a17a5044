/* Netron's own page within the page, handed the bytes of one model.
 *
 * The page is asked for where this notebook's own server is and nowhere else. It may run its scripts and save a picture; it can open no
 * window and lead this page nowhere.
 */

const SERVED = "X-Workbench-Netron";
const PATIENCE = 600; // times 50 ms until netron has started

/** Where Netron is served, or why it is not. */
async function findNetron() {
  const config = document.getElementById("jupyter-config-data");
  const base = (config && JSON.parse(config.textContent).baseUrl) || document.body.dataset.baseUrl;
  if (!base) return { why: "This page does not come from a Jupyter server, so Netron cannot be shown in it." };
  const address = new URL(`${base.replace(/\/*$/, "/")}wb-netron/`, window.location.href);
  const off = { why: "Netron is not shown: this server runs without the extension workbench.widgets.netron_server." };
  if (address.origin !== window.location.origin) return off;
  try {
    const answer = await fetch(address, { method: "HEAD", credentials: "same-origin", redirect: "manual" });
    const reason = answer.headers.get("X-Workbench-Reason");
    if (reason) return { why: `Netron is not shown: ${reason}.` };
    return answer.ok && answer.headers.has(SERVED) ? { address: address.href } : off;
  } catch {
    return off;
  }
}

class NetronPage {
  /** Opens in `place`; a promise of why it could not, or of "" once it is there. */
  constructor(place, file, bytes) {
    this.file = file;
    this.bytes = bytes;
    this.opened = this.open(place);
  }

  destroy() {
    this.gone = true;
    if (this.node) this.node.remove();
  }

  async open(place) {
    const found = await findNetron();
    if (this.gone || found.why) return found.why || "";
    this.node = element("iframe", "wb-page");
    this.node.title = `Netron: ${this.file}`;
    this.node.setAttribute("sandbox", "allow-scripts allow-same-origin allow-downloads");
    this.node.addEventListener("load", () => this.hand(0));
    this.node.src = found.address;
    place.append(this.node);
    return "";
  }

  /** Give the bytes to netron's own file input, as soon as netron listens to it. */
  hand(tries) {
    if (this.gone) return;
    const page = this.node.contentDocument;
    const input = page && page.getElementById("open-file-dialog");
    const { classList } = (page && page.body) || {};
    if (!input || !classList.contains("welcome") || classList.contains("spinner")) {
      if (tries < PATIENCE) setTimeout(() => this.hand(tries + 1), 50);
      return;
    }
    const { DataTransfer, Event } = this.node.contentWindow;
    const transfer = new DataTransfer();
    transfer.items.add(new File([this.bytes], this.file));
    input.files = transfer.files;
    input.dispatchEvent(new Event("change"));
  }
}

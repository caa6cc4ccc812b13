// Copyright 2026 The VW-LMM authors.
// SPDX-License-Identifier: Apache-2.0
// Browsers start no worker from a file: search then runs in a hidden frame, behind the interface of a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.document.write(`<script>
        var postMessage = (data) => parent.dispatchEvent(new MessageEvent("frame-worker", { data }));
        var importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((resolve, reject) => {
          const script = document.createElement("script");
          Object.assign(script, { src: url, onload: resolve, onerror: reject });
          document.body.append(script);
        })));
      </script><body><script src="${url}"></script></body>`);
      inside.document.close();
      this.ready = new Promise((resolve) => inside.addEventListener("load", resolve));
      window.addEventListener("frame-worker", ({ data }) => this.dispatchEvent(new MessageEvent("message", { data })));
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}

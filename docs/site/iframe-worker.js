// Browsers start no worker from a file; the search of a page that was opened as a file runs in a
// hidden frame instead. After iframe-worker (Martin Donath, MIT licence).
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      this.window = this.frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source !== this.window) return;
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      });
      const answer = (message) => parent.postMessage(message, "*");
      const load = (...urls) =>
        urls.reduce(
          (done, source) =>
            done.then(
              () =>
                new Promise((resolve) => {
                  const script = document.createElement("script");
                  script.src = source;
                  script.onload = resolve;
                  document.body.appendChild(script);
                }),
            ),
          Promise.resolve(),
        );
      const page = this.window.document;
      page.open();
      page.write(
        `<body><script>postMessage = ${answer}; importScripts = ${load};</script>` +
          `<script src="${url}"></script></body>`,
      );
      page.close();
      this.ready = new Promise((resolve) => (this.window.onload = resolve));
    }

    postMessage(data) {
      this.ready.then(() => this.window.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}

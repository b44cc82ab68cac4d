package driver

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// answers gives every request the same answer.
func answers(t *testing.T, status int, body string) *HTTP {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}))
	t.Cleanup(server.Close)
	dialled, err := Dial(server.URL, "")
	if err != nil {
		t.Fatal(err)
	}
	return dialled
}

func TestARefusalIsOfItsKindAndOtherErrorsAreOfNone(t *testing.T) {
	for _, of := range []struct {
		status int
		body   string
		kind   error
	}{
		{429, `{"code":"out_of_capacity","message":"m"}`, ErrNoCapacity},
		{404, `{"code":"not_found","message":"m"}`, ErrNotFound},
		{400, `{"code":"invalid","message":"m"}`, ErrInvalid},
		{409, `{"code":"conflict","message":"m"}`, ErrConflict},
		// A proxy's page is no word of the driver: nothing is gone for it.
		{404, "<html>", nil},
		{503, `{"code":"unavailable","message":"m"}`, nil},
		{500, "", nil},
	} {
		_, err := answers(t, of.status, of.body).Get(context.Background(), "x")
		if err == nil {
			t.Fatalf("%d %s is no error", of.status, of.body)
		}
		for _, kind := range []error{ErrNoCapacity, ErrNotFound, ErrInvalid, ErrConflict} {
			if errors.Is(err, kind) != (kind == of.kind) {
				t.Errorf("%d %s is %v", of.status, of.body, err)
			}
		}
	}
}

func TestWhatADriverTellsIsCheckedByField(t *testing.T) {
	shape := `{"name":"s","arch":"amd64","capacity":{"cpu":"2","memory":"4Gi","pods":"110"},
		"allocatable":{"cpu":"1","memory":"3Gi","pods":"110"},
		"offerings":[{"zone":"a","capacityType":"spot","price":0.1,"available":true}]}`
	if _, err := answers(t, 200, `{"shapes":[`+shape+`]}`).Shapes(context.Background(), Class{}); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{
		`"name":"s"`:            `"name":"a b"`,
		`"arch":"amd64",`:       ``,
		`"cpu":"1"`:             `"cpu":"3"`,
		`"pods":"110"}, `:       `"pods":"0"}, `,
		`"capacityType":"spot"`: `"capacityType":"free"`,
		`"price":0.1`:           `"price":-1`,
		`"zone":"a"`:            `"zone":""`,
		`"memory":"4Gi"`:        `"memory":"much"`,
	} {
		changed := strings.Replace(strings.ReplaceAll(shape, "},\n\t\t", "}, "), from, to, 1)
		if changed == strings.ReplaceAll(shape, "},\n\t\t", "}, ") {
			t.Fatalf("%s is not in the shape", from)
		}
		if _, err := answers(t, 200, `{"shapes":[`+changed+`]}`).Shapes(context.Background(), Class{}); err == nil {
			t.Errorf("%s is taken", to)
		}
	}
	if _, err := answers(t, 200, `{"shapes":[`+shape+`,`+shape+`]}`).Shapes(context.Background(), Class{}); err == nil {
		t.Error("one shape twice is taken")
	}
	if _, err := answers(t, 200, `{"name":"x","state":"running"}`).Get(context.Background(), "x"); err == nil {
		t.Error("an instance without a provider id is taken")
	}
}

func TestTokensAreNotSentInTheClear(t *testing.T) {
	for _, address := range []string{"http://192.0.2.1", "driver.sock", "unix://host/path", "ftp://x", ""} {
		if _, err := Dial(address, ""); err == nil {
			t.Errorf("%q is taken", address)
		}
	}
}

func TestTheDriversTokenIsReadAnewForEachCall(t *testing.T) {
	seen := ""
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header.Get("Authorization")
		_, _ = w.Write([]byte(`{"instances":[]}`))
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "token")
	if _, err := Dial(server.URL, file); err == nil {
		t.Error("a token that is not there is taken")
	}
	if err := os.WriteFile(file, []byte("one\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dialled, err := Dial(server.URL, file)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{"one", "two"} {
		if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := dialled.List(context.Background()); err != nil || seen != "Bearer "+token {
			t.Error(seen, err)
		}
	}
}
